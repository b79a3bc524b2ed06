"""Stock classifiers that can also return norms and the GlobEnc rollout."""

from pyglobenc.compat.globenc.modeling.modeling_bert import BertForSequenceClassification
from pyglobenc.compat.globenc.modeling.modeling_electra import ElectraForSequenceClassification

__all__ = ["BertForSequenceClassification", "ElectraForSequenceClassification"]

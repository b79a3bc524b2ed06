"""ELECTRA with norms, under the name of the published module."""

from pyglobenc.compat.globenc.modeling import ElectraForSequenceClassification

__all__ = ["ElectraForSequenceClassification"]

"""BERT with norms, under the name of the published module."""

from pyglobenc.compat.globenc.modeling import BertForSequenceClassification

__all__ = ["BertForSequenceClassification"]

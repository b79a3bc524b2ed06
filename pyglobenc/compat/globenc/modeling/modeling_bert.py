"""BERT with norms, under the name of the published module."""

import transformers

from pyglobenc.compat.globenc.modeling.with_norms import WithNorms


class BertForSequenceClassification(WithNorms, transformers.BertForSequenceClassification):
    """Stock BERT classifier with `output_norms` and `output_globenc`."""

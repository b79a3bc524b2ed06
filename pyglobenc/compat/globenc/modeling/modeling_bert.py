"""BERT with norms; the module has the name of the published one."""

import transformers

from pyglobenc.compat.globenc.modeling.with_norms import WithNorms


class BertForSequenceClassification(WithNorms, transformers.BertForSequenceClassification):
    """A stock BERT classifier with `output_norms` and `output_globenc`."""

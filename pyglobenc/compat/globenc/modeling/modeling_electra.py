"""ELECTRA with norms, under the name of the published module."""

import transformers

from pyglobenc.compat.globenc.modeling.with_norms import WithNorms


class ElectraForSequenceClassification(WithNorms, transformers.ElectraForSequenceClassification):
    """Stock ELECTRA classifier with `output_norms` and `output_globenc`."""

"""ELECTRA with norms; the module has the name of the published one."""

import transformers

from pyglobenc.compat.globenc.modeling.with_norms import WithNorms


class ElectraForSequenceClassification(WithNorms, transformers.ElectraForSequenceClassification):
    """A stock ELECTRA classifier with `output_norms` and `output_globenc`."""

"""Launcher of csrc/cuda/relevance_maps.cu."""

from torch import Tensor

from pyglobenc.backends.cuda._relevance import relevance_reasons as why_not
from pyglobenc.backends.cuda.relevance_attention import CudaPasses
from pyglobenc.backends.inputs import RelevanceInputs

__all__ = ["run", "why_not"]


def run(inputs: RelevanceInputs, rows: Tensor | None) -> Tensor:
    """See `pyglobenc.ops.relevance_maps`: -> (B, n, n), or (B, T, n) with rows."""
    batch, _, n, _ = inputs.q.shape
    out = inputs.q.new_empty(batch, n if rows is None else rows.shape[1], n)
    if out.numel():
        CudaPasses(inputs).launch("relevance_maps", rows=rows, map=out)
    return out

"""One layer of the rollout of relevance maps in one walk over the pairs.

The kernel is in csrc/cpu/relevance_attention.cpp.
"""

from torch import Tensor

from pyglobenc.backends.cpu._extension import relevance_limits as why_not
from pyglobenc.backends.cpu.relevance_attention import walk
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.packing import each_run

__all__ = ["run", "why_not"]


def run(inputs: RelevanceInputs, r: Tensor) -> Tensor:
    """See `pyglobenc.ops.relevance_rollout_step`: -> (B, T, n)."""
    if inputs.cu_seqlens is not None:
        return each_run(lambda own, rows: (run(own, rows),), inputs, (r,), (2,), (2,))[0]
    return walk(inputs, r, (None, None, None))[1]

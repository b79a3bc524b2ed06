"""One layer of the rollout of relevance maps, for a block of queries at a time.

The kernel is in csrc/cpu/relevance_attention.cpp.
"""

from torch import Tensor

from pyglobenc.backends.cpu._extension import relevance_limits as why_not
from pyglobenc.backends.cpu._relevance import query_tiles
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.packing import each_run
from pyglobenc.backends.shared.relevance_tiles import roll_rows

__all__ = ["run", "why_not"]


def run(inputs: RelevanceInputs, r: Tensor) -> Tensor:
    """See `pyglobenc.ops.relevance_rollout_step`: -> (B, T, n)."""
    if inputs.cu_seqlens is not None:
        return each_run(lambda own, rows: (run(own, rows),), inputs, (r,), (2,), (2,))[0]
    out = r.new_zeros(r.shape)
    for tile in query_tiles(inputs):
        roll_rows(out, r, tile, tile.weighted.sum(-1), inputs.normalize)
    return out

"""One layer of the rollout of relevance maps in row mode: r (I + A).

A is that of `relevance_attention`, and is rebuilt for a block of queries at a time. This op is for a layer
below which no relevance is needed. It takes 3 n^2 d multiply-adds and tiles of n*d floats.
"""

from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.reference.relevance_attention import query_tiles
from pyglobenc.backends.shared.packing import each_run
from pyglobenc.backends.shared.relevance_tiles import roll_out


def run(inputs: RelevanceInputs, r: Tensor) -> Tensor:
    """See `pyglobenc.ops.relevance_rollout_step`: -> (B, T, n)."""
    if inputs.cu_seqlens is not None:
        return each_run(lambda own, rows: (run(own, rows),), inputs, (r,), (2,), (2,))[0]
    return roll_out(query_tiles(inputs), r, inputs.normalize)

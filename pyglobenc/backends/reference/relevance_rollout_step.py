"""One layer of the rollout of relevance maps in row mode: r (I + A), A rebuilt a block of queries at a time.

A as in `relevance_attention`, whose pass gives the same; this one is for a layer through which no relevance has to go.
Cost 3 n^2 d multiply-adds, tiles of n*d floats.
"""

import torch
from torch import Tensor

from pyglobenc.backends.reference.relevance_attention import PACKED_AXES, query_tiles, roll_rows
from pyglobenc.backends.shared.packing import by_runs


def relevance_rollout_step(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    normalize: bool,
    offsets: Tensor | None = None,
) -> Tensor:
    """See `pyglobenc.ops.relevance_rollout_step`: -> (B, T, n)."""
    if offsets is not None:
        options, tensors = (None, scaling, window, normalize), (r, q, k, v, lse, grad_o, s)
        return by_runs(lambda *each: (relevance_rollout_step(*each, *options),), tensors, PACKED_AXES, (2,), offsets)[0]
    out = torch.zeros_like(r)
    for tile in query_tiles(q, k, v, lse, grad_o, s, key_mask, scaling, window):
        roll_rows(out, r, tile, tile.weighted.sum(-1), normalize)
    return out

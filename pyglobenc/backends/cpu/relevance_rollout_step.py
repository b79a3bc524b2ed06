"""One layer of the rollout of relevance maps in row mode, a block of queries at a time: csrc/cpu/relevance_attention.cpp."""

from torch import Tensor

from pyglobenc.backends.cpu._extension import single
from pyglobenc.backends.cpu._relevance import query_tiles
from pyglobenc.backends.reference.relevance_attention import PACKED_AXES, roll_rows
from pyglobenc.backends.shared.packing import by_runs


def not_supported(r, q, k, v, lse, grad_o, s, key_mask, scaling, window, normalize, offsets=None) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.relevance_rollout_step` can't run here."""
    return single(*(t for t in (r, q, k, v, lse, grad_o, s) if t is not None))


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
    out = r.new_zeros(r.shape)
    for tile in query_tiles(q, k, v, lse, grad_o, s, key_mask, scaling, window):
        roll_rows(out, r, tile, tile.weighted.sum(-1), normalize)
    return out

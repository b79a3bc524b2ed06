"""The map of one layer that the relevance rollout multiplies, a block of queries at a time: csrc/cpu/relevance_attention.cpp."""

from torch import Tensor

from pyglobenc.backends.cpu._extension import single
from pyglobenc.backends.cpu._relevance import query_tiles
from pyglobenc.backends.reference.token_norms import take_queries


def not_supported(q, k, v, lse, grad_o, s, rows, key_mask, scaling, window) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.relevance_maps` can't run here."""
    return single(*(t for t in (q, k, v, lse, grad_o, s) if t is not None))


def relevance_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    rows: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
) -> Tensor:
    """See `pyglobenc.ops.relevance_maps`: -> (B, n, n), or (B, T, n) with rows."""
    if rows is not None:
        q, lse, s = (take_queries(t, rows) for t in (q, lse, s))
        grad_o = None if grad_o is None else take_queries(grad_o, rows)
    out = q.new_empty(q.shape[0], q.shape[2], k.shape[2])
    for tile in query_tiles(q, k, v, lse, grad_o, s, key_mask, scaling, window, rows):
        out[:, tile.rows] = tile.weighted
    return out

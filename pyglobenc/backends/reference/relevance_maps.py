"""The map of one layer that the rollout multiplies: A[i,j] = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0).

(Chefer et al., 2021, eq. 13 without the identity.) Cost 3 n^2 d multiply-adds, the map and tiles of n*d floats.
"""

from torch import Tensor

from pyglobenc.backends.reference.relevance_attention import query_tiles
from pyglobenc.backends.reference.token_norms import take_queries


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

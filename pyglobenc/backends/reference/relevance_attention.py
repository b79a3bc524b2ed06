"""Relevance through softmax attention, with the map that the rollout uses, a block of queries at a time.

    alpha[i,j] = exp(scaling q[i].k[j] - lse[i])
    R_alpha[i,j] = alpha[i,j] <s[i], v[j]> / 2             R_v[j] = v[j] sum_i alpha[i,j] s[i] / 2,      s = R_o / safe(o)
    U = R'[i,j] / safe(q[i].k[j])                          R_q = q (U k) / 2,   R_k = k (U^T q) / 2
    A[i,j] = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0)

(Chefer et al., 2021, eq. 7, 13 and the published code's matmul rules). R' is R_alpha, or, after BERT's additive mask,
c R_alpha t / safe(t) with t = scaling q.k and c the add rule's factor for the example. c multiplies R_q and R_k, so it is applied at
the end and one pass over the pairs does everything: 9 n^2 d multiply-adds, tiles of n*d floats, no n*n array.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.backends.shared.packing import by_runs
from pyglobenc.backends.shared.safe_division import safe_divide

# smaller blocks waste the GEMMs, larger ones leave the cache
TILE_FLOATS = 1 << 18
LEAST_QUERIES = 16

# axes of tokens of q, k, v, lse, grad_o, s and r
PACKED_AXES = (2,) * 7


@dataclass
class Tile:
    """Pairs of a block of queries with all keys; dots, alpha and relevance are (B, H, I, n)."""

    rows: slice
    dots: Tensor  # q . k, unscaled
    alpha: Tensor  # 0 for masked keys
    relevance: Tensor  # R_alpha
    weighted: Tensor  # A, (B, I, n)


def relevance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    r: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    additive_mask: bool,
    normalize: bool,
    stabilizer: float,
    offsets: Tensor | None = None,
    rescale: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`: -> R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), r_out (B, T, n) or None.

    Without rescale the factor c of the additive mask is 1 (the LRP baseline's rule).
    """
    if offsets is not None:
        options = (None, scaling, window, additive_mask, normalize, stabilizer, None, rescale)
        tensors = (q, k, v, lse, grad_o, s, r)
        return tuple(by_runs(lambda *each: relevance_attention(*each, *options), tensors, PACKED_AXES, (2, 2, 2, 1, 2), offsets))
    r_q, r_k, r_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    row_sums = q.new_empty(q.shape[0], q.shape[2])
    r_out = None if r is None else torch.zeros_like(r)
    total = kept = q.new_zeros(q.shape[0], dtype=torch.float64)
    for tile in query_tiles(q, k, v, lse, grad_o, s, key_mask, scaling, window):
        rows = tile.rows
        row_sums[:, rows] = tile.weighted.sum(-1)
        if r is not None:
            roll_rows(r_out, r, tile, row_sums[:, rows], normalize)
        r_v += tile.alpha.transpose(2, 3) @ s[:, :, rows]
        passed = tile.relevance
        if additive_mask:
            total = total + passed.sum((1, 2, 3), dtype=torch.float64)
            scores = tile.dots * scaling
            passed = safe_divide(passed, scores).mul_(scores)
            kept = kept + passed.sum((1, 2, 3), dtype=torch.float64)
        u = safe_divide(passed, tile.dots, stabilizer)
        r_q[:, :, rows] = u @ k
        r_k += u.transpose(2, 3) @ q[:, :, rows]
    for out, operand in ((r_q, q), (r_k, k), (r_v, v)):
        out.mul_(operand).mul_(0.5)
    if additive_mask and rescale:
        rescale_scores(r_q, r_k, total, kept)
    return r_q, r_k, r_v, row_sums, r_out


def rescale_scores(r_q: Tensor, r_k: Tensor, total: Tensor, kept: Tensor) -> None:
    """Multiply R_q and R_k (B, H, n, dh) by the factor c of the additive mask, in place.

    The add rule with the mask as second branch, whose relevance is 0: masked keys have alpha = 0. total and kept, (B,) float64, are the
    sums of R_alpha and of what the rule leaves of it.
    """
    factor = safe_divide(safe_divide(kept.abs(), kept.abs()) * total, kept).to(r_q.dtype).view(-1, 1, 1, 1)
    r_q *= factor
    r_k *= factor


def roll_rows(r_out: Tensor, r: Tensor, tile: Tile, row_sums: Tensor, normalize: bool) -> None:
    """Add what a tile's rows give to r_out (B, T, n): r (I + A), each row divided by its sum if normalize."""
    weights = r[:, :, tile.rows]
    if normalize:
        weights = weights / (1 + row_sums)[:, None]
    r_out += weights @ tile.weighted
    r_out[:, :, tile.rows] += weights


def query_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    positions: Tensor | None = None,
) -> Iterator[Tile]:
    """Tiles over blocks of queries; positions (B, m) says which query each of the m rows of q is, None: row i is query i."""
    values = v.transpose(2, 3)
    for rows, dots, alpha in probability_tiles(q, k, lse, key_mask, scaling, window, positions):
        relevance = (s[:, :, rows] @ values).mul_(alpha).mul_(0.5)
        weighted = relevance.clamp(min=0) if grad_o is None else (grad_o[:, :, rows] @ values).mul_(relevance).clamp_(min=0)
        yield Tile(rows, dots, alpha, relevance, weighted.mean(1))


def probability_tiles(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    positions: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (block of queries, q . k, alpha), both (B, H, I, n); arguments as for `query_tiles`."""
    batch, heads, m, _ = q.shape
    n = k.shape[2]
    keys = k.transpose(2, 3)
    hidden = None if key_mask is None else ~key_mask[:, None, None, :]
    block = max(LEAST_QUERIES, TILE_FLOATS // max(1, batch * heads * n))
    for start in range(0, m, block):
        rows = slice(start, min(m, start + block))
        dots = q[:, :, rows] @ keys
        alpha = torch.mul(dots, scaling).sub_(lse[:, :, rows, None])
        if max(window) >= 0:
            alpha.masked_fill_(outside(positions, rows, n, window, q.device), float("-inf"))
        alpha.exp_()
        if hidden is not None:
            # their scores are not in lse: the exponential may be inf
            alpha.masked_fill_(hidden, 0)
        yield rows, dots, alpha


def outside(positions: Tensor | None, rows: slice, n: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """Keys that the queries `rows` don't see, bool (B or 1, 1, I, n): j outside [i - left, i + right]."""
    i = torch.arange(rows.start, rows.stop, device=device)[None] if positions is None else positions[:, rows]
    ahead = torch.arange(n, device=device) - i[..., None]
    left, right = window
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    return hidden[:, None]

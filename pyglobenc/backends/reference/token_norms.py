"""Norms of the decomposed vectors of every (query, key) pair, by the head-Gram identity.

    norm[i, j]^2 = rstd[i]^2 * (a^T G[j] a + (i == j) (2 a . c[i] + residual_sq[i])),   a = alpha[:, i, j] in R^H

(Modarressi et al., 2022, eq. 6 to 10, expanded). H*(dh + H) multiply-adds and H exponentials a pair; the work is tiled over keys so
that a tile of probabilities holds about as many numbers as the hidden states do.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyglobenc.backends.shared.score_mods import ScoreMod


def token_norms(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    residual_sq: Tensor | None,
    rstd: Tensor | None,
    key_mask: Tensor | None,
    rows: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """See `pyglobenc.ops.token_norms`: -> (B, n, n), or (B, T, n) with rows."""
    batch, _, n, _ = q.shape
    q, k, lse = q.to(gram.dtype), k.to(gram.dtype), lse.to(gram.dtype)
    diagonal = None if cross is None else diagonal_sq(q, k, lse, gram, cross, residual_sq, scaling, score_mod)
    positions = None
    if rows is not None:
        q, lse = take_queries(q, rows), take_queries(lse, rows)
        positions = rows
    out = q.new_empty(batch, q.shape[2], n)
    own = None if rows is not None else diagonal
    for start, sq in key_tiles(q, k, lse, gram, own, key_mask, positions, scaling, window, score_mod):
        out[:, :, start : start + sq.shape[1]] = sq.transpose(1, 2)
    if rows is not None and diagonal is not None:
        out.scatter_(2, rows[:, :, None], diagonal.gather(1, rows)[:, :, None])
    out = out.clamp_(min=0).sqrt_()
    if rstd is not None:
        out *= (rstd if rows is None else rstd.gather(1, rows))[:, :, None]
    if key_mask is not None:
        out.masked_fill_(~key_mask[:, None, :], 0)
        out.masked_fill_(~(key_mask if rows is None else key_mask.gather(1, rows))[:, :, None], 0)
    return out


def take_queries(t: Tensor, rows: Tensor) -> Tensor:
    """Queries `rows` (B, T) of t (B, H, n, ...)."""
    index = rows[:, None, :].expand(-1, t.shape[1], -1)
    if t.dim() == 3:
        return t.gather(2, index)
    return t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[-1]))


def diagonal_sq(q, k, lse, gram, cross, residual_sq, scaling: float, score_mod: ScoreMod | None = None) -> Tensor:
    """Squared norm of each token's own vector, residual included, without the row scale: (B, n)."""
    a = own_attention(q, k, lse, scaling, score_mod).transpose(1, 2)  # (B, n, H)
    return (a * (torch.einsum("bnhg,bng->bnh", gram, a) + 2 * cross)).sum(-1) + residual_sq


def own_attention(q: Tensor, k: Tensor, lse: Tensor, scaling: float, score_mod: ScoreMod | None = None) -> Tensor:
    """alpha[h, i, i]: (B, H, n)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q * k).sum(-1) * scaling
    if score_mod is not None:
        scores = score_mod.diagonal(scores, q, k)
    return (scores - lse).exp()


def key_tiles(
    q, k, lse, gram, diagonal, key_mask, positions, scaling: float, window: tuple[int, int], score_mod: ScoreMod | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first key, squared norms (B, J, m) of J keys for all m queries, row scale and masks of padding left out)."""
    batch, n_heads, m, dh = q.shape
    n = k.shape[2]
    k = k.repeat_interleave(n_heads // k.shape[1], dim=1)
    modify = None if score_mod is None else score_mod.bind(q, k)
    i = torch.arange(m, device=q.device)[None] if positions is None else positions
    q = (q * scaling).transpose(2, 3)
    offset = -lse[:, :, None, :]
    for start in range(0, n, block_of_keys(n, m, dh)):
        stop = min(n, start + block_of_keys(n, m, dh))
        alpha = torch.matmul(k[:, :, start:stop], q)  # (B, H, J, m)
        if modify is not None:
            alpha = modify(alpha.transpose(2, 3), slice(0, m), i, slice(start, stop)).transpose(2, 3)
        alpha.add_(offset)
        hide_window(alpha, positions, start, stop, window)
        alpha = alpha.exp_().transpose(1, 2)  # (B, J, H, m)
        sq = torch.matmul(gram[:, start:stop], alpha).mul_(alpha).sum(2)
        if diagonal is not None:
            torch.diagonal(sq[:, :, start:stop], dim1=1, dim2=2).copy_(diagonal[:, start:stop])
        if key_mask is not None:
            # the scores of padded keys are not in lse: their exponential may be inf
            sq.masked_fill_(~key_mask[:, start:stop, None], 0)
        yield start, sq


def block_of_keys(n: int, m: int, dh: int) -> int:
    """Keys a tile: the tile's H*J*m probabilities number at most H*n*dh, as the values do."""
    return max(1, min(n, n * dh // max(m, 1), 64))


def hide_window(scores: Tensor, positions: Tensor | None, start: int, stop: int, window: tuple[int, int]) -> None:
    """Write -inf, in place, where key j is outside [i - left, i + right]; scores (B, H, J, m)."""
    left, right = window
    if left < 0 and right < 0:
        return
    if positions is None:
        positions = torch.arange(scores.shape[-1], device=scores.device)[None]
    ahead = torch.arange(start, stop, device=scores.device)[None, :, None] - positions[:, None, :]  # j - i
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    scores.masked_fill_(hidden[:, None], float("-inf"))

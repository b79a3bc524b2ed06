"""Selected queries, each token's attention to itself, and the scaling of a rollout's rows."""

import torch
from torch import Tensor

from pyglobenc.backends.shared.packing import per_sequence, per_token
from pyglobenc.backends.shared.score_mods import ScoreMod


def positive_part_(t: Tensor) -> Tensor:
    """Replace t, of any shape such as (B, n, n), by max(t, 0) in place, and return it.

    NaN stays NaN, and -inf becomes NaN: a sum that overflowed may stand for any number.
    """
    return t.sub_(t.clamp(max=0))


def take_queries(t: Tensor, rows: Tensor) -> Tensor:
    """Return the queries `rows` (B, T) of t (B, H, n, ...): (B, H, T, ...)."""
    index = rows[:, None, :].expand(-1, t.shape[1], -1)
    if t.dim() == 3:
        return t.gather(2, index)
    return t.gather(2, index[..., None].expand(-1, -1, -1, t.shape[-1]))


def own_attention(
    q: Tensor, k: Tensor, lse: Tensor, scaling: float, score_mod: ScoreMod | None = None
) -> Tensor:
    """Return alpha[h, i, i], each token's attention to itself, (B, H, n)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q * k).sum(-1) * scaling
    if score_mod is not None:
        scores = score_mod.diagonal(scores, q, k)
    return (scores - lse).exp()


def rescale_rows(r: Tensor, log_scale: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale each row of r (B, T, n) to maximum 1, and add the logarithm of its scale to log_scale (B, T).

    Rows of zeros stay zero.

    With cu_seqlens (S + 1,), each packed sequence's part of a row has its own scale: r is (1, T, N),
    log_scale (S, T).
    """
    top = r.amax(-1) if cu_seqlens is None else per_sequence(r, cu_seqlens)
    top = torch.where(top > 0, top, 1)
    return r / (top[..., None] if cu_seqlens is None else per_token(top, cu_seqlens)), log_scale + top.log()

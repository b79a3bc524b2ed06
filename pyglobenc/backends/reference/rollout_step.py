"""One layer of the rollout in row mode: r_(l-1) = r_l N_l, N_l rebuilt tile by tile and never stored (section 2.2 of the design).

The cost is that of `token_norms`; memory O(n*d + T*n).
"""

import torch
from torch import Tensor

from pyglobenc.backends.reference.token_norms import diagonal_sq, key_tiles
from pyglobenc.backends.shared.packing import by_runs, per_sequence, per_token
from pyglobenc.backends.shared.score_mods import ScoreMod


def rollout_step(
    r: Tensor,
    log_scale: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    residual_sq: Tensor | None,
    rstd: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    offsets: Tensor | None = None,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.rollout_step`: -> r @ norms (B, T, n), each row scaled to maximum 1, and log_scale (B, T)."""
    tensors, settings = (r, q, k, lse, gram, cross, residual_sq, rstd, key_mask), (scaling, window, score_mod)
    if offsets is None:
        return rescale_rows(_product(*tensors, *settings), log_scale)
    (out,) = by_runs(lambda *each: (_product(*each, *settings),), tensors, (2, 2, 2, 2, 1, 1, 1, 1, 1), (2,), offsets)
    return rescale_rows(out, log_scale, offsets)


def _product(r, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window, score_mod) -> Tensor:
    """r @ norms (B, T, n)."""
    q, k, lse = q.to(gram.dtype), k.to(gram.dtype), lse.to(gram.dtype)
    diagonal = None if cross is None else diagonal_sq(q, k, lse, gram, cross, residual_sq, scaling, score_mod)
    weights = r if rstd is None else r * rstd[:, None]
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask[:, None], 0)
    weights = weights.transpose(1, 2)
    out = torch.empty_like(r)
    for start, sq in key_tiles(q, k, lse, gram, diagonal, key_mask, None, scaling, window, score_mod):
        out[:, :, start : start + sq.shape[1]] = (sq.clamp_(min=0).sqrt_() @ weights).transpose(1, 2)
    return out


def rescale_rows(r: Tensor, log_scale: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale each row to maximum 1 and move its scale to log_scale: r (B, T, n), log_scale (B, T); rows of zeros stay.

    With offsets (S + 1,) of packed sequences each sequence's part of a row has its own scale: r (1, T, N), log_scale (S, T).
    """
    top = r.amax(-1) if offsets is None else per_sequence(r, offsets)
    top = torch.where(top > 0, top, 1)
    return r / (top[..., None] if offsets is None else per_token(top, offsets)), log_scale + top.log()

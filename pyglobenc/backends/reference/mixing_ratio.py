"""The share of a token's output that comes from other tokens (Kobayashi et al., 2021, eq. 7).

    ratio[i] = |S[i] - t_ii| / (|S[i] - t_ii| + |t_ii|),   S[i] = sum_j t_ij

The scale of the row cancels, and S[i] - t_ii = (o[i] - alpha_ii v[i]) W_O M. So no vector of another pair is
needed, and the ratios take n*d^2 multiply-adds. They are the ratios of the published GlobEnc code.
"""

import torch
from torch import Tensor

from pyglobenc.backends.shared.rows import own_attention
from pyglobenc.backends.shared.score_mods import ScoreMod


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mapped_weight: Tensor,
    mapped_x: Tensor | None,
    scaling: float,
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """See `pyglobenc.ops.mixing_ratio`: -> (B, n)."""
    q, k, v, o, lse = (t.to(mapped_weight.dtype) for t in (q, k, v, o, lse))
    a = own_attention(q, k, lse, scaling, score_mod)[..., None]
    own = a * v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    rows = mapped_weight.flatten(0, 1)
    mixed = (o - own).transpose(1, 2).flatten(2) @ rows
    kept = own.transpose(1, 2).flatten(2) @ rows
    if mapped_x is not None:
        kept = kept + mapped_x
    mixed, kept = mixed.norm(dim=-1), kept.norm(dim=-1)
    # A lone token receives nothing; without this case, two zero vectors would give 0/0.
    return torch.where(mixed > 0, mixed / (mixed + kept), mixed)

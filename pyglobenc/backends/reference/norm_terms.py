"""The terms of a stage's squared norms, computed from the heads' transformed vectors themselves.

    f[h, j]     = v[h, j] W_O[h] M
    G[j][h, h'] = <f[h, j], f[h', j]>
    c[i][h]     = <f[h, i], x[i] M>
    and the residual term |x[i] M|^2

f takes n*d^2 multiply-adds, G takes n*d*H^2/2, and c takes n*d*H. The only matrix that is prepared from the
weights is W_O M, with d^2 entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.reference.stage_map import stage_map

# The smallest number of tokens whose f exist at a time. It is larger if f still has no more entries than x.
MIN_TOKENS = 32


def run(
    v: Tensor, weight: Tensor, x: Tensor | None = None, gammas: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `pyglobenc.ops.norm_terms`: -> G (B, n, H, H), c (B, n, H) and |x M|^2 (B, n), or None for both."""
    heads, dh, d = weight.shape
    batch, kv_heads, n, _ = v.shape
    mapped, v = stage_map(weight, gammas), v.to(weight.dtype)
    gram = v.new_empty(batch, n, heads, heads)
    residual = None if x is None else stage_map(x.to(weight.dtype), gammas)
    cross = None if x is None else v.new_empty(batch, n, heads)
    for start in range(0, n, block := max(MIN_TOKENS, -(-n // heads))):
        tokens = slice(start, start + block)
        values = v[:, :, tokens].repeat_interleave(heads // kv_heads, dim=1)
        f = torch.matmul(values, mapped).transpose(1, 2)  # (B, block, H, d)
        gram[:, tokens] = f @ f.mT
        if residual is not None:
            cross[:, tokens] = (f @ residual[:, tokens, :, None]).squeeze(-1)
    return gram, cross, None if residual is None else residual.square().sum(-1)

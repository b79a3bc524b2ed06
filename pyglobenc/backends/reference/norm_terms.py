"""What the squared norms of a stage are made of, from the heads' transformed vectors themselves.

    f[h, j] = v[h, j] W_O[h] M,   G[j][h, h'] = <f[h, j], f[h', j]>,   c[i][h] = <f[h, i], x[i] M>,   |x[i]
    M|^2

n*d^2 multiply-adds for f, n*d*H^2/2 for G, n*d*H for c, and nothing of the weights alone but the d^2 entries
of W_O M.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.reference.stage_map import stage_map

# tokens whose f exist at a time, at least; more where f still holds no more numbers than x
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

"""The terms of a stage's squared norms, in C++: csrc/cpu/norm_terms.cpp.

A few features of the transformed vectors at a time stay in the first-level cache. With torch's GEMMs, n*H*d
numbers would be written and read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, limits


def why_not(v: Tensor, weight: Tensor, x: Tensor | None = None, gammas: Sequence[Tensor] = ()) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.norm_terms` can't run here; empty if they can."""
    return limits(weight, v)


def run(
    v: Tensor, weight: Tensor, x: Tensor | None = None, gammas: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `pyglobenc.ops.norm_terms`: -> G (B, n, H, H), c (B, n, H) and |x M|^2 (B, n), or None for both."""
    (batch, _, n, dh), heads = v.shape, weight.shape[0]
    gram = weight.new_empty(batch, n, heads, heads)
    cross, residual = (
        (None, None) if x is None else (weight.new_empty(batch, n, heads), weight.new_empty(batch, n))
    )
    out = (gram, cross, residual)
    if gram.numel() == 0 or dh == 0 or weight.shape[2] == 0:
        return tuple(t if t is None else t.zero_() for t in out)
    # The kernel reads W_O as a Linear layer stores it, with a row for each output. Other layouts are copied.
    if weight.stride()[:2] != (dh, 1):
        weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    gamma = torch.stack(tuple(gammas)) if gammas else None
    kernels.norm_terms(v, weight, x, gamma, out, torch.get_num_threads())
    return out

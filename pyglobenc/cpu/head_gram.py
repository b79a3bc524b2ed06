"""Gram matrices of the heads' transformed vectors in C++, the cross terms' projection by torch's GEMM: csrc/cpu/head_gram.cpp.

The symmetric half of G is summed in registers; torch's GEMMs would write and read its n*d*H/2 products.
"""

import torch
from torch import Tensor

from pyglobenc.cpu._extension import kernels, limits


def not_supported(v, kernel, x=None, cross_kernel=None) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.head_gram` can't run here."""
    return limits(v, kernel)


def head_gram(v: Tensor, kernel: Tensor, x: Tensor | None = None, cross_kernel: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """See `pyglobenc.ops.head_gram`: -> G (B, n, H, H), c (B, n, H) or None."""
    B, _, n, dh = v.shape
    heads = kernel.shape[0]
    gram = torch.zeros(B, n, heads, heads)
    cross = projected = None
    if x is not None:
        projected = x @ cross_kernel.flatten(0, 1).T
        cross = torch.zeros(B, n, heads)
    if gram.numel():
        v = v if v.stride(3) == 1 else v.contiguous()
        kernels.head_gram(v, kernel.contiguous(), projected, gram, cross, torch.get_num_threads())
    return gram, cross

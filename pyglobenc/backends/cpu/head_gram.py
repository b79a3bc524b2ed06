"""Gram matrices of the heads' transformed vectors and their cross terms in C++: csrc/cpu/head_gram.cpp.

The kernel adds up both in registers. With torch's GEMMs, n*d*H/2 products for G and n*d for c would be
written and read, and the weights would be packed again in each call.
"""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, limits


def why_not(v, kernel, x=None, cross_kernel=None) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.head_gram` can't run here; empty if they can."""
    return limits(kernel, v)


def run(
    v: Tensor, kernel: Tensor, x: Tensor | None = None, cross_kernel: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `pyglobenc.ops.head_gram`: -> G (B, n, H, H), c (B, n, H) or None."""
    B, _, n, dh = v.shape
    heads = kernel.shape[0]
    v, x = v.float(), None if x is None else x.float()
    gram, cross = v.new_zeros(B, n, heads, heads), None if x is None else v.new_zeros(B, n, heads)
    if gram.numel():
        # The kernel reads contiguous rows of both matrices.
        kernel, cross_kernel = (
            t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (kernel, cross_kernel)
        )
        kernels.head_gram(v, kernel, x, cross_kernel, gram, cross, torch.get_num_threads())
    return gram, cross

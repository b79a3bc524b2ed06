"""Norms of the heads' transformed vectors as quadratic forms, |v W_O|^2 = v (W_O W_O^T) v^T: csrc/cpu/head_gram.cpp, a head at a time.

n*d*dh + d^2*dh multiply-adds for the n*d^2 of the vectors themselves, of which none is formed.
"""

import torch
from torch import Tensor

from pyglobenc.cpu._extension import kernels, limits


def not_supported(v, weight) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.head_norms` can't run here."""
    return limits(v, weight)


def head_norms(v: Tensor, weight: Tensor) -> Tensor:
    """See `pyglobenc.ops.head_norms`: -> (B, n, H)."""
    heads, group = weight.shape[0], weight.shape[0] // v.shape[1]
    squares = v.new_zeros(v.shape[0], v.shape[2], heads)
    if squares.numel():
        forms = weight @ weight.mT  # (H, dh, dh)
        for h in range(heads):
            own = squares[:, :, h, None, None]  # (B, n, 1, 1), as of one head's Gram matrix
            kernels.head_gram(v[:, h // group, None], forms[h, None, :, None], None, None, own, None, torch.get_num_threads())
    return squares.clamp_(min=0).sqrt_()

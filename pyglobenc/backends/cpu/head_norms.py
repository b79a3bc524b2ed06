"""Norms of the heads' transformed vectors as quadratic forms, |v W_O|^2 = v (W_O W_O^T) v^T:
csrc/cpu/head_gram.cpp, a head at a time.

n*d*dh + d^2*dh multiply-adds for the n*d^2 of the vectors themselves. A form loses digits where v lies near
the null space of W_O, and float32 doesn't hold squares of very large or very small numbers. Only those
vectors are formed whose norms the forms don't give.
"""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, limits
from pyglobenc.backends.reference.head_norms import vector_norms

# Least part of |v|^2 |W_O W_O^T|, with the root mean square of the eigenvalues as that norm, which a form
# must be. The form's rounding is that of its largest terms: at a sixteenth its root was off by 6e-7 of itself
# at most, on random matrices with singular values from 1 to 1e-4 and heads of 1 to 256.
LEAST = 1 / 16
# a form between these bounds has neither overflowed nor lost a product that counts
TINY, HUGE = 2.0**-100, 2.0**100


def why_not(v, weight) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.head_norms` can't run here."""
    return limits(v, weight)


def run(v: Tensor, weight: Tensor) -> Tensor:
    """See `pyglobenc.ops.head_norms`: -> (B, n, H)."""
    heads, group = weight.shape[0], weight.shape[0] // v.shape[1]
    squares = v.new_zeros(v.shape[0], v.shape[2], heads)
    if squares.numel() == 0:
        return squares
    forms = weight @ weight.mT  # (H, dh, dh)
    for h in range(heads):
        own = squares[:, :, h, None, None]  # (B, n, 1, 1), as of one head's Gram matrix
        kernels.head_gram(
            v[:, h // group, None], forms[h, None, :, None], None, None, own, None, torch.get_num_threads()
        )
    lost = ~trusted(squares, v, forms)
    norms = squares.sqrt_()
    for h in lost.any(0).any(0).nonzero().flatten().tolist():
        rows = lost[:, :, h]
        norms[:, :, h][rows] = vector_norms(v[:, h // group][rows] @ weight[h])
    return norms


def trusted(squares: Tensor, v: Tensor, forms: Tensor) -> Tensor:
    """Whether each form has float32's digits, (B, n, H) bool: squares (B, n, H), v (B, Hkv, n, dh), forms (H,
    dh, dh).
    """
    sizes = (
        torch.linalg.vector_norm(forms, dim=(1, 2), dtype=torch.float64)
        .div(max(1, v.shape[3]) ** 0.5)
        .float()
    )
    sizes.masked_fill_(sizes < TINY, torch.inf)
    lengths = (
        v.square().sum(-1).transpose(1, 2).repeat_interleave(len(forms) // v.shape[1], dim=2)
    )  # (B, n, H)
    # a comparison with NaN is false
    return (squares >= (LEAST * sizes * lengths).clamp_(min=TINY)) & (squares <= HUGE)

"""Norms of the heads' transformed vectors as quadratic forms, |v W_O|^2 = v (W_O W_O^T) v^T.

csrc/cpu/head_gram.cpp computes them for one head at a time. They take n*d*dh + d^2*dh multiply-adds, while
the vectors themselves would take n*d^2. A form loses digits where v lies near the null space of W_O. Also,
the squares of very large or very small numbers lie outside the range of float32. In both cases the vector is
formed, and its norm is computed from it.
"""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, limits
from pyglobenc.backends.reference.head_norms import vector_norms

# A form is used if it is at least this fraction of |v|^2 |W_O W_O^T|, where the last norm is the root mean
# square of the eigenvalues. The rounding error of a form depends on its largest terms. At a sixteenth, the
# relative error of its root was at most 6e-7, on random matrices with singular values from 1 to 1e-4 and head
# sizes from 1 to 256.
LEAST = 1 / 16
# A form between these bounds has not overflowed, and no product that matters has underflowed.
TINY, HUGE = 2.0**-100, 2.0**100


def why_not(v, weight) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.head_norms` can't run here; empty if they can."""
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
    """Return (B, n, H) bool, True for each form that is as precise as float32 allows.

    squares are the forms' values (B, n, H), v is (B, Hkv, n, dh), and forms are W_O W_O^T, (H, dh, dh).
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
    # A comparison with NaN is false, so a form that is NaN is not trusted.
    return (squares >= (LEAST * sizes * lengths).clamp_(min=TINY)) & (squares <= HUGE)

"""The guarded division of the relevance rules."""

import torch
from torch import Tensor

GUARD = 1e-9


def safe_divide(a: Tensor, b: Tensor, stabilizer: float = 0.0) -> Tensor:
    """Return a / safe(b), elementwise, and 0 where b is 0.

    The published guard ignores the sign: safe(b) = b + 1e-9, and 1e-9 where that sum is 0. It is kept
    exactly, because on random weights a sign-aware guard of the same size changes the results.

    Args:
        a, b: tensors whose shapes broadcast.
        stabilizer: 0 for the published guard; e > 0 for safe(b) = b + e * sign(b).

    Returns:
        The quotient, of the broadcast shape.

    Source: safe_divide of the code of Chefer et al., 2021.
    """
    if stabilizer:
        den = torch.where(b < 0, b - stabilizer, b + stabilizer)
    else:
        den = b + GUARD
        den.masked_fill_(den == 0, GUARD)
    return (a / den).masked_fill_(b == 0, 0)

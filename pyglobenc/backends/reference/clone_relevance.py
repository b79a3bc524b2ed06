"""Relevance of a tensor that several branches read: R = x * sum_k R_k / safe(x).

Source: the Clone module of the code of Chefer et al., 2021.
"""

from collections.abc import Sequence

from torch import Tensor

from pyglobenc.backends.shared.safe_division import safe_divide


def run(parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """See `pyglobenc.ops.clone_relevance`: -> (B, n, d)."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return safe_divide(total, x).mul_(x)

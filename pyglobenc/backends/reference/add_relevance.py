"""Relevance through a residual sum a + b (Chefer et al., 2021, eq. 9 and 10; the published code's Add).

    S = R / safe(a + b),   R_a = a S,   R_b = b S

Then each branch is rescaled, per example, to its share |sum R_a| / (|sum R_a| + |sum R_b|) of the total sum
R. The sums run in float64, because their terms have both signs and are up to 1e6 times as large as the sum.
"""

import torch
from torch import Tensor

from pyglobenc.backends.shared.packing import by_runs
from pyglobenc.backends.shared.safe_division import safe_divide


def run(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    stabilizer: float = 0.0,
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.add_relevance`: -> R_a, R_b (B, n, d)."""
    if cu_seqlens is not None:
        return tuple(
            by_runs(lambda *each: run(*each, stabilizer, rescale), (r, a, b), (1, 1, 1), (1, 1), cu_seqlens)
        )
    s = safe_divide(r, a + b, stabilizer)
    r_a, r_b = a * s, b * s
    if not rescale:
        return r_a, r_b
    axes = tuple(range(1, r.dim()))
    sum_a, sum_b, total = (t.sum(axes, dtype=torch.float64) for t in (r_a, r_b, r))
    both = sum_a.abs() + sum_b.abs()
    shape = (-1,) + (1,) * len(axes)
    for branch, own in ((r_a, sum_a), (r_b, sum_b)):
        factor = safe_divide(safe_divide(own.abs(), both) * total, own)
        branch.mul_(factor.to(r.dtype).view(shape))
    return r_a, r_b

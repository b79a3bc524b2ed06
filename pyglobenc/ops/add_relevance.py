"""Op `add_relevance`: relevance through a residual sum."""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.ops._checks import check_cu_seqlens, check_floats, check_shape
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def add_relevance(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    stabilizer: float = 0.0,
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Split the relevance of a + b over the two branches.

        S = R / safe(a + b),   R_a = a S,   R_b = b S,   share_a = |sum R_a| / safe(|sum R_a| + |sum R_b|)
        R_a *= share_a sum R / safe(sum R_a),   R_b likewise

    The sums run over n and d of one example. safe(t) = t + 1e-9, or 1e-9 where that is 0. A quotient is 0
    where t is 0. The published code sums over the batch, so it is right for a single example only.

    Args:
        r: relevance of the sum a + b, (B, n, d), float32 or float64.
        a, b: values of the two branches in the forward pass, (B, n, d), the dtype of r.
        stabilizer: 0 for the guard above in S. With e > 0 the divisor is a + b + e * sign(a + b).
        rescale: False leaves out the second line, as in the rule of the LRP baseline.
        cu_seqlens: ends of packed sequences, (S + 1,), as for `rollout_step`. The sums then run over each
            sequence.
        backend: "auto" or a backend's name.

    Returns:
        R_a and R_b, (B, n, d) each, the dtype of r.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 9 and 10; the Add module of the published code.
    """
    op, sizes = "add_relevance", {}
    for name, t in (("r", r), ("a", a), ("b", b)):
        check_shape(op, name, t, "B n d", sizes)
    check_floats(op, r=r, a=a, b=b)
    check_cu_seqlens(op, cu_seqlens, None, sizes)
    return _add_relevance(r, a, b, float(stabilizer), rescale, backend, cu_seqlens)


@register("add_relevance")
def _add_relevance(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    stabilizer: float,
    rescale: bool,
    backend: str,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return run("add_relevance", backend, BACKENDS, r, a, b, stabilizer, rescale, cu_seqlens)


@_add_relevance.register_fake
def _(r, a, b, stabilizer, rescale, backend, cu_seqlens=None):
    return tuple(torch.empty_like(r, memory_format=torch.contiguous_format) for _ in range(2))

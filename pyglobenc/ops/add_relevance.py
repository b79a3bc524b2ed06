"""Op `add_relevance`: relevance through a residual sum."""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import pick
from pyglobenc.ops._checks import check_floats, check_offsets, check_shape
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def add_relevance(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    stabilizer: float = 0.0,
    rescale: bool = True,
    offsets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Split the relevance of a + b over the two branches.

        S = R / safe(a + b),   R_a = a S,   R_b = b S,   share_a = |sum R_a| / safe(|sum R_a| + |sum R_b|)
        R_a *= share_a sum R / safe(sum R_a),   R_b likewise

    with the sums over n and d of one example (the published code's run over the batch and are right for one example only) and
    safe(t) = t + 1e-9, 1e-9 where that is 0, the quotient 0 where t is 0.

    Args:
        r: relevance of the sum, (B, n, d), float32 or float64.
        a, b: the branches in the forward pass, (B, n, d), same dtype.
        stabilizer: 0 for that guard in S; e > 0 divides by a + b + e * sign(a + b) instead.
        rescale: False leaves out the second line (the LRP baseline's rule).
        offsets: of S sequences packed into one, as `rollout_step` takes them: each is an example with sums of its own.
        backend: "auto" or a backend's name.

    Returns:
        R_a and R_b, (B, n, d).

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 9 and 10; the Add module of the published code.
    """
    op, sizes = "add_relevance", {}
    for name, t in (("r", r), ("a", a), ("b", b)):
        check_shape(op, name, t, "B n d", sizes)
    check_floats(op, r=r, a=a, b=b)
    check_offsets(op, offsets, None, sizes)
    return _add_relevance(r, a, b, float(stabilizer), rescale, backend, offsets)


@register("add_relevance")
def _add_relevance(
    r: Tensor, a: Tensor, b: Tensor, stabilizer: float, rescale: bool, backend: str, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    args = (r, a, b, stabilizer, rescale, offsets)
    return pick("add_relevance", backend, BACKENDS, args)(*args)


@_add_relevance.register_fake
def _(r, a, b, stabilizer, rescale, backend, offsets=None):
    return tuple(torch.empty_like(r, memory_format=torch.contiguous_format) for _ in range(2))

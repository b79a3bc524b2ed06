"""Op `clone_relevance`: relevance of a tensor that several branches read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import run
from pyglobenc.ops._checks import check_floats, check_shape
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def clone_relevance(parts: Sequence[Tensor], x: Tensor, *, backend: str = "auto") -> Tensor:
    """Add the relevances R_k of the copies of x: R = x * sum_k R_k / safe(x).

    Here safe(x) = x + 1e-9, or 1e-9 where that is 0. R is 0 where x is 0.

    Args:
        parts: relevance of each copy, (B, n, d), at least one, float32 or float64.
        x: value of the tensor in the forward pass, (B, n, d), the dtype of the parts.
        backend: "auto" or a backend's name.

    Returns:
        The relevance of x, (B, n, d). Up to the guard it is the sum of the parts.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: the Clone and IndexSelect modules of the published code of Chefer et al., 2021.
    """
    op, sizes = "clone_relevance", {}
    if not parts:
        raise ValueError(f"{op}: parts must hold at least one tensor")
    check_shape(op, "x", x, "B n d", sizes)
    for index, part in enumerate(parts):
        check_shape(op, f"parts[{index}]", part, "B n d", sizes)
        check_floats(op, x=x, part=part)
    return _clone_relevance(list(parts), x, backend)


@register("clone_relevance")
def _clone_relevance(parts: list[Tensor], x: Tensor, backend: str) -> Tensor:
    return run("clone_relevance", backend, BACKENDS, parts, x)


@_clone_relevance.register_fake
def _(parts, x, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)

"""Op `linear_relevance`: relevance through a Linear layer."""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import pick
from pyglobenc.ops._checks import check_floats, check_shape
from pyglobenc.ops._registered import register

BACKENDS = ("triton", "cuda", "cpu", "reference")


def linear_relevance(
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    abs_weight: Tensor | None = None,
    output: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Relevance of a Linear layer's input from that of its output, alpha = 1, beta = 0, the bias ignored.

        Z = x+ W+^T + x- W-^T        S = R / safe(Z)        R_in = x+ (S W+) + x- (S W-)

    with t+ = max(t, 0), t- = min(t, 0); safe(b) = b + 1e-9, 1e-9 where that is 0, and the quotient is 0 where b is 0. Computed as
    Z = (x W^T + |x| |W|^T) / 2 and R_in = (x (S W) + |x| (S |W|)) / 2, but for outputs whose Z is so small a part of |x| |W|^T that
    the sum loses its digits.

    Args:
        r: relevance of the output, (B, n, d_out), float32 or float64.
        x: input of the forward pass, (B, n, d_in), the dtype of r.
        weight: (d_out, d_in), any float dtype, cast to that of r.
        abs_weight: |weight|, if kept; same shape.
        output: x W^T + bias of the forward pass, (B, n, d_out), the dtype of r; None computes it.
        bias: (d_out,), what output contains beside x W^T; None: nothing.
        backend: "auto" or a backend's name.

    Returns:
        relevance of x, (B, n, d_in); its sum is that of r up to the guard, over the outputs with Z > 0.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 5; the Linear module of the published code.
    """
    op, sizes = "linear_relevance", {}
    check_shape(op, "r", r, "B n d_out", sizes)
    check_shape(op, "x", x, "B n d_in", sizes)
    check_shape(op, "weight", weight, "d_out d_in", sizes)
    check_shape(op, "abs_weight", abs_weight, "d_out d_in", sizes)
    check_shape(op, "output", output, "B n d_out", sizes)
    check_shape(op, "bias", bias, "d_out", sizes)
    check_floats(op, r=r, x=x, output=output)
    if r.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: r must be float32 or float64, got {r.dtype}")
    return _linear_relevance(r, x, weight, abs_weight, output, bias, backend)


@register("linear_relevance")
def _linear_relevance(
    r: Tensor, x: Tensor, weight: Tensor, abs_weight: Tensor | None, output: Tensor | None, bias: Tensor | None, backend: str
) -> Tensor:
    args = (r, x, weight, abs_weight, output, bias)
    return pick("linear_relevance", backend, BACKENDS, args)(*args)


@_linear_relevance.register_fake
def _(r, x, weight, abs_weight, output, bias, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)

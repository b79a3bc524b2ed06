"""Op `linear_relevance`: relevance through a Linear layer."""

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import run
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
    """Propagate relevance from a Linear layer's output to its input, with alpha = 1 and beta = 0.

    The bias gets no relevance.

        Z = x+ W+^T + x- W-^T        S = R / safe(Z)        R_in = x+ (S W+) + x- (S W-)

    with t+ = max(t, 0) and t- = min(t, 0). safe(b) = b + 1e-9, or 1e-9 where that is 0; the quotient is 0
    where b is 0. The op computes Z = (x W^T + |x| |W|^T) / 2 and R_in = (x (S W) + |x| (S |W|)) / 2. Where Z
    is so small beside |x| |W|^T that this loses digits, it sums the positive terms instead.

    Args:
        r: relevance of the output, (B, n, d_out), float32 or float64.
        x: input of the forward pass, (B, n, d_in), the dtype of r.
        weight: (d_out, d_in), any float dtype, cast to that of r.
        abs_weight: |weight|, (d_out, d_in), if the caller has it; None: the op computes it.
        output: x W^T + bias of the forward pass, (B, n, d_out), the dtype of r; None: the op computes it.
        bias: (d_out,), contained in output; None: no bias.
        backend: "auto" or a backend's name.

    Returns:
        The relevance of x, (B, n, d_in). Its sum is that of r over the outputs with Z > 0, up to the guard.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit, or a backend that can't run.

    Source: Chefer et al., 2021, eq. 5; the Linear module of the published code.
    """
    op, sizes = "linear_relevance", {}
    check_shape(op, "r", r, "B n d_out", sizes)
    check_shape(op, "x", x, "B n d_in", sizes)
    check_shape(op, "weight", weight, "d_out d_in", sizes)
    check_shape(op, "abs_weight", abs_weight, "d_out d_in", sizes, optional=True)
    check_shape(op, "output", output, "B n d_out", sizes, optional=True)
    check_shape(op, "bias", bias, "d_out", sizes, optional=True)
    check_floats(op, r=r, x=x, output=output)
    if r.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: r must be float32 or float64, got {r.dtype}")
    return _linear_relevance(r, x, weight, abs_weight, output, bias, backend)


@register("linear_relevance")
def _linear_relevance(
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    abs_weight: Tensor | None,
    output: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    return run("linear_relevance", backend, BACKENDS, r, x, weight, abs_weight, output, bias)


@_linear_relevance.register_fake
def _(r, x, weight, abs_weight, output, bias, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)

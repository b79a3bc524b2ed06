"""Launcher of csrc/cuda/linear_relevance.cu, around torch's GEMMs."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._relevance import float32_reasons
from pyglobenc.backends.shared.dead_outputs import DEAD, around_gemms


def why_not(
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    abs_weight: Tensor | None = None,
    output: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.linear_relevance` can't run here; empty if they can."""
    # The weights may have any floating-point dtype.
    weights = dict(x=x, weight=weight, abs_weight=abs_weight, bias=bias)
    return float32_reasons(r=r, x=x, output=output) or _extension.device_reasons(weights)


def run(
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    abs_weight: Tensor | None = None,
    output: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `pyglobenc.ops.linear_relevance`: -> (B, n, d_in)."""
    kernels = _extension.kernels
    with _extension.launching(r.device) as stream:
        return around_gemms(
            *(r, x, weight, abs_weight, output, bias, kernels.LINEAR_STRIP),
            quotient=lambda *tensors: kernels.linear_quotient(*tensors, DEAD[torch.float32], stream),
            product=lambda *tensors: kernels.linear_product(*tensors, stream),
        )

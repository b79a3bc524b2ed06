"""Launcher of csrc/cuda/linear_relevance.cu, around torch's GEMMs.

Outputs whose Z is a tiny part of |x| |W|^T are counted in the first pass and, if there are any, done in the reference's clamped form.
Reading the count is the one place where the host waits for the device.
"""

import torch
from torch import Tensor

from pyglobenc.cuda import _extension
from pyglobenc.cuda._relevance import float32_reasons, new_like
from pyglobenc.reference.linear_relevance import DEAD, around_gemms


def not_supported(
    r: Tensor, x: Tensor, weight: Tensor, abs_weight: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None
) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    # the weights may have any float dtype
    weights = dict(x=x, weight=weight, abs_weight=abs_weight, bias=bias)
    return float32_reasons(r=r, x=x, output=output) or _extension.device_reasons(weights)


def linear_relevance(
    r: Tensor, x: Tensor, weight: Tensor, abs_weight: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See `pyglobenc.ops.linear_relevance`: -> (B, n, d_in)."""
    return around_gemms(r, x, weight, abs_weight, output, bias, quotient, product)


def quotient(r: Tensor, y: Tensor, bound: Tensor, bias: Tensor | None, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """S (B, n, d_out), 0 at outputs that are nearly dead, and how many each block has of those; marks them in dead, if given."""
    s = torch.empty_like(r)
    counts = torch.empty(-(-r.numel() // _extension.kernels.QUOTIENT_BLOCK), dtype=torch.int64, device=r.device)
    with _extension.launching(r.device) as stream:
        _extension.kernels.linear_quotient((r, y, bound, bias, s, dead, counts), DEAD[torch.float32], stream)
    return s, counts


def product(x: Tensor, signed: Tensor, unsigned: Tensor) -> Tensor:
    """R_in (B, n, d_in) of x, S W and S |W|."""
    out = new_like(x)
    with _extension.launching(x.device) as stream:
        _extension.kernels.linear_product(x, signed, unsigned, out, stream)
    return out

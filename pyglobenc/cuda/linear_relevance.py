"""Launcher of csrc/cuda/linear_relevance.cu, around torch's GEMMs.

Outputs whose Z is a tiny part of |x| |W|^T are counted in the first pass and, if there are any, done in the reference's clamped form.
Reading the count is the one place where the host waits for the device.
"""

import torch
from torch import Tensor

from pyglobenc.cuda import _extension
from pyglobenc.cuda._relevance import float32_reasons, new_like
from pyglobenc.reference.linear_relevance import DEAD, MOST_DEAD, add_single_outputs, clamped_relevance


def not_supported(
    r: Tensor, x: Tensor, weight: Tensor, abs_weight: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None
) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    reasons = float32_reasons(r=r, x=x, output=output)
    return reasons + [f"weight is on {weight.device}, x on {x.device}"] * (weight.device != x.device)


def linear_relevance(
    r: Tensor, x: Tensor, weight: Tensor, abs_weight: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See `pyglobenc.ops.linear_relevance`: -> (B, n, d_in)."""
    if r.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    r, x, weight = r.contiguous(), x.contiguous(), weight.to(x.dtype)
    abs_weight = weight.abs() if abs_weight is None else abs_weight.to(x.dtype)
    bound = x.abs() @ abs_weight.T
    y = x @ weight.T if output is None else output.contiguous()
    bias = None if output is None or bias is None else bias.to(x.dtype).contiguous()
    s, count = quotient(r, y, bound, bias)
    dead = None
    if count:
        if count > MOST_DEAD * r.numel():
            return clamped_relevance(r, x, weight)
        dead = torch.empty_like(r, dtype=torch.bool)
        quotient(r, y, bound, bias, dead)
    out = new_like(x)
    with _extension.launching(x.device) as stream:
        _extension.kernels.linear_product(x, s @ weight, s @ abs_weight, out, stream)
    if dead is not None:
        add_single_outputs(out, dead, r, x, weight)
    return out


def quotient(r: Tensor, y: Tensor, bound: Tensor, bias: Tensor | None, dead: Tensor | None = None) -> tuple[Tensor, int]:
    """S (B, n, d_out), 0 at outputs that are nearly dead, and how many those are; marks them in dead, if given."""
    s = torch.empty_like(r)
    counts = torch.empty(-(-r.numel() // _extension.kernels.QUOTIENT_BLOCK), dtype=torch.int64, device=r.device)
    with _extension.launching(r.device) as stream:
        _extension.kernels.linear_quotient((r, y, bound, bias, s, dead, counts), DEAD[torch.float32], stream)
    return s, int(counts.sum())

"""Relevance through a Linear layer: the elementwise work around torch's GEMMs, fused (Chefer et al., 2021, eq. 5).

    Z = (y - b + |x| |W|^T) / 2,   S = R / safe(Z)       one pass: three reads, one write, where torch makes seven passes
    R_in = (x (S W) + |x| (S |W|)) / 2                    one pass: three reads, one write

Outputs whose Z is a tiny part of |x| |W|^T are counted in the first pass and, if there are any, done in the reference's clamped form.
Reading the count is the one place where the host waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.kernels._device import device_reasons, on
from pyglobenc.kernels._division import float32_reasons, safe_divide_rn
from pyglobenc.reference.linear_relevance import DEAD, around_gemms

BLOCK = 4096
DEAD_PART = tl.constexpr(DEAD[torch.float32])


@triton.jit
def _quotient_kernel(
    R,  # (rows, d_out)
    Y,  # (rows, d_out)
    BOUND,  # (rows, d_out)
    BIAS,  # (d_out,)
    S,  # (rows, d_out)
    IS_DEAD,  # (rows, d_out) bool
    COUNTS,  # (programs,) int32
    size, d_out, HAS_BIAS: tl.constexpr, MARK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    ok = at < size
    r = tl.load(R + at, mask=ok, other=0.0)
    bound = tl.load(BOUND + at, mask=ok, other=0.0)
    z = tl.load(Y + at, mask=ok, other=0.0) + bound
    if HAS_BIAS:
        # one division of 64 bits a block, of 32 bits an element
        column = ((first % d_out).to(tl.int32) + tl.arange(0, BLOCK)) % d_out
        bias = tl.load(BIAS + column, mask=ok, other=0.0)
        z -= bias
        bound += tl.abs(bias)
    z *= 0.5
    dead = (z - DEAD_PART * bound < 0) & (r != 0)
    tl.store(S + at, tl.where(dead, 0.0, safe_divide_rn(r, z, 0.0, False)), mask=ok)
    tl.store(COUNTS + tl.program_id(0), tl.sum(dead.to(tl.int32), 0))
    if MARK:
        tl.store(IS_DEAD + at, dead, mask=ok)


@triton.jit
def _combine_kernel(
    X,  # (size,)
    SIGNED,  # (size,): S W
    UNSIGNED,  # (size,): S |W|
    OUT,  # (size,)
    size, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    x = tl.load(X + at, mask=ok, other=0.0)
    signed = tl.load(SIGNED + at, mask=ok, other=0.0)
    unsigned = tl.load(UNSIGNED + at, mask=ok, other=0.0)
    tl.store(OUT + at, (signed * x + unsigned * tl.abs(x)) * 0.5, mask=ok)


def not_supported(
    r: Tensor, x: Tensor, weight: Tensor, abs_weight: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None
) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    # the weights may have any float dtype
    weights = dict(x=x, weight=weight, abs_weight=abs_weight, bias=bias)
    return float32_reasons(r=r, x=x, output=output) or device_reasons(weights)


def linear_relevance(
    r: Tensor, x: Tensor, weight: Tensor, abs_weight: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See `pyglobenc.ops.linear_relevance`: -> (B, n, d_in)."""
    return around_gemms(r, x, weight, abs_weight, output, bias, quotient, product)


def quotient(r: Tensor, y: Tensor, bound: Tensor, bias: Tensor | None, dead: Tensor | None) -> tuple[Tensor, Tensor]:
    """S (B, n, d_out), 0 at outputs that are nearly dead, and how many each block has of those; marks them in dead, if given."""
    s = torch.empty_like(r)
    programs = triton.cdiv(r.numel(), BLOCK)
    counts = torch.empty(programs, dtype=torch.int32, device=r.device)
    flags = dict(HAS_BIAS=bias is not None, MARK=dead is not None, BLOCK=BLOCK, num_warps=8)
    with on(r.device):
        _quotient_kernel[(programs,)](r, y, bound, bias, s, dead, counts, r.numel(), r.shape[-1], **flags)
    return s, counts


def product(x: Tensor, signed: Tensor, unsigned: Tensor) -> Tensor:
    """R_in (B, n, d_in) of x, S W and S |W|."""
    out = torch.empty_like(x)
    with on(x.device):
        _combine_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, signed, unsigned, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out

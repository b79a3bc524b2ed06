"""Relevance through a Linear layer: the fused elementwise passes around torch's GEMMs.

(Chefer et al., 2021, eq. 5.) There are two passes, each with three reads and one write:

    Z = (y - b + |x| |W|^T) / 2,   S = R / safe(Z)
    R_in = (x (S W) + |x| (S |W|)) / 2

torch would make seven passes for the first line. Where Z is a tiny fraction of |x| |W|^T + |b|, it has lost
its digits, and the first pass sets S to 0. For each such output it computes Z = sum_e max(x_e w_e, 0), stores
R / safe(Z) in place of |x| |W|^T, and sets the flag of the strip. The second pass then adds R / safe(Z)
max(x_e w_e, 0). So the host need not know of these outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.shared.dead_outputs import DEAD, around_gemms
from pyglobenc.kernels._device import device_reasons, on, power_of_two
from pyglobenc.kernels._division import float32_reasons, safe_divide_rn

# Number of columns of a token that one program takes: 32 bytes for each thread.
STRIP = 256
DEAD_PART = tl.constexpr(DEAD[torch.float32])


@triton.jit
def clamped_sum(X, W, d_in, stride_wi, BLOCK: tl.constexpr):
    """Return sum_e max(x[e] w[e], 0) for one row of x and one of W."""
    parts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, d_in, BLOCK):
        e = start + tl.arange(0, BLOCK)
        x = tl.load(X + e, mask=e < d_in, other=0.0)
        w = tl.load(W + e.to(tl.int64) * stride_wi, mask=e < d_in, other=0.0)
        parts += tl.maximum(x * w, 0.0)
    return tl.sum(parts, 0)


@triton.jit
def _quotient_kernel(
    X,  # (rows, d_in)
    W,  # (d_out, d_in)
    BOUND,  # (rows, d_out): |x| |W|^T, overwritten in flagged strips
    FLAGS,  # (rows, strips) int32
    R,  # (rows, d_out)
    Y,  # (rows, d_out)
    BIAS,  # (d_out,)
    S,  # (rows, d_out)
    d_in, d_out, strips, stride_wo, stride_wi, HAS_BIAS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // strips).to(tl.int64)
    column = tl.program_id(0) % strips * STRIP + tl.arange(0, STRIP)
    ok = column < d_out
    at = row * d_out + column
    r = tl.load(R + at, mask=ok, other=0.0)
    bound = tl.load(BOUND + at, mask=ok, other=0.0)
    z = tl.load(Y + at, mask=ok, other=0.0) + bound
    if HAS_BIAS:
        bias = tl.load(BIAS + column, mask=ok, other=0.0)
        z -= bias
        bound += tl.abs(bias)
    z *= 0.5
    dead = (z - DEAD_PART * bound < 0) & (r != 0)
    tl.store(S + at, tl.where(dead, 0.0, safe_divide_rn(r, z, 0.0, False)), mask=ok)
    some = tl.sum(dead.to(tl.int32), 0)
    tl.store(FLAGS + tl.program_id(0).to(tl.int64), some)
    if some > 0:
        alone = tl.zeros((STRIP,), tl.float32)
        for _ in range(0, some):
            first = tl.min(tl.where(dead, column, d_out), 0)
            exact = clamped_sum(X + row * d_in, W + first.to(tl.int64) * stride_wo, d_in, stride_wi, STRIP)
            alone = tl.where(column == first, safe_divide_rn(r, exact, 0.0, False), alone)
            dead = dead & (column != first)
        tl.store(BOUND + at, alone, mask=ok)


@triton.jit
def _product_kernel(
    X,  # (rows, d_in)
    W,  # (d_out, d_in)
    ALONE,  # (rows, d_out): BOUND after the first pass
    FLAGS,  # (rows, strips) int32
    OUT,  # (rows, d_in): S W on entry, R_in on exit
    UNSIGNED,  # (rows, d_in): S |W|
    d_in, d_out, in_strips, strips, stride_wo, stride_wi, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // in_strips).to(tl.int64)
    e = tl.program_id(0) % in_strips * STRIP + tl.arange(0, STRIP)
    ok = e < d_in
    at = row * d_in + e
    x = tl.load(X + at, mask=ok, other=0.0)
    unsigned = tl.load(UNSIGNED + at, mask=ok, other=0.0)
    out = (tl.load(OUT + at, mask=ok, other=0.0) * x + unsigned * tl.abs(x)) * 0.5
    strip = tl.arange(0, STRIPS)
    flags = tl.load(FLAGS + row * strips + strip, mask=strip < strips, other=0)
    if tl.max(flags, 0) > 0:
        for each in range(0, strips):
            if tl.load(FLAGS + row * strips + each) > 0:
                o = each * STRIP + tl.arange(0, STRIP)
                dead = tl.load(ALONE + row * d_out + o, mask=o < d_out, other=0.0) != 0
                for _ in range(0, tl.sum(dead.to(tl.int32), 0)):
                    first = tl.min(tl.where(dead, o, d_out), 0)
                    w = W + first.to(tl.int64) * stride_wo + e.to(tl.int64) * stride_wi
                    w = tl.load(w, mask=ok, other=0.0)
                    out += tl.load(ALONE + row * d_out + first) * tl.maximum(x * w, 0.0)
                    dead = dead & (o != first)
    tl.store(OUT + at, out, mask=ok)


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
    return float32_reasons(r=r, x=x, output=output) or device_reasons(weights)


def run(
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    abs_weight: Tensor | None = None,
    output: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `pyglobenc.ops.linear_relevance`: -> (B, n, d_in)."""
    with on(r.device):
        return around_gemms(r, x, weight, abs_weight, output, bias, STRIP, quotient, product)


def quotient(common: tuple[Tensor, ...], own: tuple[Tensor | None, ...]) -> None:
    """Launch the first pass; `around_gemms` gives the shapes of its arguments."""
    (x, weight, _, flags), (r, _, bias, _) = common, own
    sizes = (x.shape[-1], r.shape[-1], flags.shape[1], *weight.stride())
    _quotient_kernel[(flags.numel(),)](
        *common, *own, *sizes, HAS_BIAS=bias is not None, STRIP=STRIP, num_warps=1
    )


def product(common: tuple[Tensor, ...], own: tuple[Tensor, ...]) -> None:
    """Launch the second pass; `around_gemms` gives the shapes of its arguments."""
    x, weight, bound, flags = common
    in_strips, strips = -(-x.shape[-1] // STRIP), flags.shape[1]
    sizes = (x.shape[-1], bound.shape[-1], in_strips, strips, *weight.stride())
    grid = (flags.shape[0] * in_strips,)
    _product_kernel[grid](*common, *own, *sizes, STRIP=STRIP, STRIPS=power_of_two(strips, 1), num_warps=1)

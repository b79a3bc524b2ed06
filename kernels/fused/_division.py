"""The guarded division of the relevance rules in Triton, and the dtype check of the elementwise kernels."""

from functools import partial

import triton
import triton.language as tl

from pyglobenc.backends.shared import launch
from pyglobenc.backends.shared.safe_division import GUARD
from pyglobenc.kernels._device import device_reasons

PUBLISHED_GUARD = tl.constexpr(GUARD)


@triton.jit
def safe_denominator(b, stabilizer, STABILIZED: tl.constexpr):
    """Return the denominator of `pyglobenc.backends.shared.safe_division`."""
    if STABILIZED:
        return tl.where(b < 0, b - stabilizer, b + stabilizer)
    guarded = b + PUBLISHED_GUARD
    return tl.where(guarded == 0, PUBLISHED_GUARD, guarded)


@triton.jit
def safe_divide(a, b, stabilizer, STABILIZED: tl.constexpr):
    """Return a / safe(b), and 0 where b is 0."""
    return tl.where(b == 0, 0.0, a / safe_denominator(b, stabilizer, STABILIZED))


@triton.jit
def safe_divide_rn(a, b, stabilizer, STABILIZED: tl.constexpr):
    """Return a / safe(b) for float32, rounded to nearest like torch's division.

    This costs nothing in kernels that are limited by memory.
    """
    return tl.where(b == 0, 0.0, tl.div_rn(a, safe_denominator(b, stabilizer, STABILIZED)))


# Returns why a float32 kernel can't run on tensors; see `pyglobenc.backends.shared.launch.float32_reasons`.
float32_reasons = partial(launch.float32_reasons, device_reasons)

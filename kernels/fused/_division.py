"""The guarded division of the relevance rules on the device, and reasons that the elementwise rules share."""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.shared import dtypes
from pyglobenc.backends.shared.safe_division import GUARD
from pyglobenc.kernels._device import device_reasons

PUBLISHED_GUARD = tl.constexpr(GUARD)


@triton.jit
def safe_denominator(b, stabilizer, STABILIZED: tl.constexpr):
    """What `pyglobenc.backends.shared.safe_division` divides by."""
    if STABILIZED:
        return tl.where(b < 0, b - stabilizer, b + stabilizer)
    guarded = b + PUBLISHED_GUARD
    return tl.where(guarded == 0, PUBLISHED_GUARD, guarded)


@triton.jit
def safe_divide(a, b, stabilizer, STABILIZED: tl.constexpr):
    """a / safe(b), 0 where b is 0."""
    return tl.where(b == 0, 0.0, a / safe_denominator(b, stabilizer, STABILIZED))


@triton.jit
def safe_divide_rn(a, b, stabilizer, STABILIZED: tl.constexpr):
    """The same for float32, rounded to nearest as torch's division is: free where memory binds."""
    return tl.where(b == 0, 0.0, tl.div_rn(a, safe_denominator(b, stabilizer, STABILIZED)))


def float32_reasons(widened: dict[str, Tensor | None] | None = None, **tensors: Tensor | None) -> list[str]:
    """Why a float32 kernel can't run on these tensors; those it widens may be in half precision."""
    widened = widened or {}
    return device_reasons({**widened, **tensors}) + dtypes.float32_reasons(widened, tensors)

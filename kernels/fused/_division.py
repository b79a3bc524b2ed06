"""The guarded division of the relevance rules on the device, and reasons that the elementwise rules share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.kernels._device import HALF, device_reasons
from pyglobenc.reference.safe_division import GUARD

PUBLISHED_GUARD = tl.constexpr(GUARD)


@triton.jit
def safe_denominator(b, stabilizer, STABILIZED: tl.constexpr):
    """What `pyglobenc.reference.safe_division` divides by."""
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
    given = {**(widened or {}), **tensors}
    reasons = device_reasons(given)
    others = {name: t for name, t in given.items() if t is not None and t.dtype != torch.float32 and t.is_floating_point()}
    wrong = [f"{name} {t.dtype}" for name, t in others.items() if t.dtype not in HALF or name in tensors]
    if wrong:
        reasons.append("computes in float32, got " + ", ".join(wrong))
    return reasons

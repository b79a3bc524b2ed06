"""Relevance of a tensor that several branches read, in one pass: R = x * sum_k R_k / safe(x).

This is the Clone module of the published code of Chefer et al., 2021. The kernel reads x and each part once
and writes the result, while torch makes one pass for each operation.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.kernels._device import on
from pyglobenc.kernels._division import float32_reasons, safe_divide_rn

BLOCK = 4096
MAX_PARTS = 4


@triton.jit
def _clone_relevance_kernel(
    P0,  # (size,)
    P1,  # (size,)
    P2,  # (size,)
    P3,  # (size,)
    X,  # (size,)
    OUT,  # (size,)
    size, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    total = tl.load(P0 + at, mask=ok, other=0.0)
    if COUNT > 1:
        total += tl.load(P1 + at, mask=ok, other=0.0)
    if COUNT > 2:
        total += tl.load(P2 + at, mask=ok, other=0.0)
    if COUNT > 3:
        total += tl.load(P3 + at, mask=ok, other=0.0)
    x = tl.load(X + at, mask=ok, other=0.0)
    tl.store(OUT + at, safe_divide_rn(total, x, 0.0, False) * x, mask=ok)


def why_not(parts: Sequence[Tensor], x: Tensor) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.clone_relevance` can't run here; empty if they can."""
    reasons = float32_reasons(x=x, **{f"parts[{index}]": part for index, part in enumerate(parts)})
    if len(parts) > MAX_PARTS:
        reasons.append(f"takes up to {MAX_PARTS} parts, got {len(parts)}")
    return reasons


def run(parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """See `pyglobenc.ops.clone_relevance`: -> (B, n, d)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    given = [part.contiguous() for part in parts]
    given += [given[0]] * (MAX_PARTS - len(given))
    with on(x.device):
        _clone_relevance_kernel[(-(-x.numel() // BLOCK),)](
            *given, x.contiguous(), out, x.numel(), COUNT=len(parts), BLOCK=BLOCK, num_warps=8
        )
    return out

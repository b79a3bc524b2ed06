"""Relevance through a residual sum a + b in two passes (Chefer et al., 2021, eq. 9 and 10).

    S = R / safe(a + b),   R_a = a S,   R_b = b S

Then each branch is rescaled, per example, to its share of the total relevance. The first pass writes each
block's sums of R_a, R_b and R in float64, because their terms cancel up to a millionfold. The second pass
adds the blocks in a fixed order and writes both branches. r, a and b are read twice and two results are
written. That is 8 floats for each element; plain torch takes about 20.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.shared.packing import on_device
from pyglobenc.kernels._device import COUNTS, example, on
from pyglobenc.kernels._division import float32_reasons, safe_divide, safe_divide_rn

BLOCK = 2048
# Number of blocks for an example. They fill a GPU, and one program can still add up their sums.
MAX_BLOCKS = 256


@triton.jit
def _branches(R, A, B, at, ok, stabilizer, STABILIZED: tl.constexpr):
    """Return r, and R_a and R_b before the rescaling."""
    r = tl.load(R + at, mask=ok, other=0.0)
    a = tl.load(A + at, mask=ok, other=0.0)
    b = tl.load(B + at, mask=ok, other=0.0)
    s = safe_divide_rn(r, a + b, stabilizer, STABILIZED)
    return r, a * s, b * s


@triton.jit(do_not_specialize=COUNTS)
def _add_relevance_sums_kernel(
    R,  # (batch, size)
    A,  # (batch, size)
    B,  # (batch, size)
    # (S + 1,): ends of packed sequences. batch is then S, and size the number of entries of one token.
    CU_SEQLENS,
    SUMS,  # (batch, 3, blocks) float64: sums of R_a, R_b and R
    stabilizer, size, per_block, blocks, PACKED: tl.constexpr, STABILIZED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block, number = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, first, count = example(CU_SEQLENS, number, 1, PACKED)
    base, size = (b + first) * size, count * tl.cast(size, tl.int64)
    sum_a = tl.zeros((BLOCK,), tl.float64)
    sum_b = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    low = block.to(tl.int64) * per_block
    for start in range(low, tl.minimum(low + per_block, size), BLOCK):
        at = start + tl.arange(0, BLOCK)
        r, r_a, r_b = _branches(R, A, B, base + at, at < size, stabilizer, STABILIZED)
        sum_a += r_a.to(tl.float64)
        sum_b += r_b.to(tl.float64)
        total += r.to(tl.float64)
    of_block = SUMS + number * 3 * blocks + block
    tl.store(of_block, tl.sum(sum_a, 0))
    tl.store(of_block + blocks, tl.sum(sum_b, 0))
    tl.store(of_block + 2 * blocks, tl.sum(total, 0))


@triton.jit(do_not_specialize=COUNTS)
def _add_relevance_kernel(
    R,  # (batch, size)
    A,  # (batch, size)
    B,  # (batch, size)
    # (S + 1,): ends of packed sequences. batch is then S, and size the number of entries of one token.
    CU_SEQLENS,
    SUMS,  # (batch, 3, blocks) float64
    R_A,  # (batch, size)
    R_B,  # (batch, size)
    stabilizer, size, per_block, blocks, RESCALE: tl.constexpr, PACKED: tl.constexpr, BLOCKS: tl.constexpr,
    STABILIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block, number = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, first, count = example(CU_SEQLENS, number, 1, PACKED)
    base, size = (b + first) * size, count * tl.cast(size, tl.int64)
    low = block.to(tl.int64) * per_block
    if PACKED and low >= size:
        return
    if RESCALE:
        part = tl.arange(0, BLOCKS)
        of_block = SUMS + number * 3 * blocks + part
        sum_a = tl.sum(tl.load(of_block, mask=part < blocks, other=0.0), 0)
        sum_b = tl.sum(tl.load(of_block + blocks, mask=part < blocks, other=0.0), 0)
        total = tl.sum(tl.load(of_block + 2 * blocks, mask=part < blocks, other=0.0), 0)
        both = tl.abs(sum_a) + tl.abs(sum_b)
        factor_a = safe_divide(safe_divide(tl.abs(sum_a), both, 0.0, False) * total, sum_a, 0.0, False).to(
            tl.float32
        )
        factor_b = safe_divide(safe_divide(tl.abs(sum_b), both, 0.0, False) * total, sum_b, 0.0, False).to(
            tl.float32
        )
    for start in range(low, tl.minimum(low + per_block, size), BLOCK):
        at = start + tl.arange(0, BLOCK)
        ok = at < size
        _, r_a, r_b = _branches(R, A, B, base + at, ok, stabilizer, STABILIZED)
        if RESCALE:
            r_a *= factor_a
            r_b *= factor_b
        tl.store(R_A + base + at, r_a, mask=ok)
        tl.store(R_B + base + at, r_b, mask=ok)


def why_not(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    stabilizer: float = 0.0,
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.add_relevance` can't run here; empty if they can."""
    return float32_reasons(r=r, a=a, b=b)


def run(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    stabilizer: float = 0.0,
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.add_relevance`: -> R_a, R_b (B, n, d)."""
    r_a, r_b = (torch.empty_like(r, memory_format=torch.contiguous_format) for _ in range(2))
    if r.numel() == 0:
        return r_a, r_b
    # Sequences need separate treatment only for their sums.
    packed = rescale and cu_seqlens is not None
    examples, size = (len(cu_seqlens) - 1, r.shape[2]) if packed else (r.shape[0], r[0].numel())
    cu_seqlens, longest = on_device(cu_seqlens, r.device) if packed else (None, 1)
    tiles = -(-longest * size // BLOCK)
    blocks = min(MAX_BLOCKS, tiles)
    per_block = -(-tiles // blocks) * BLOCK
    sums = torch.empty(examples, 3, blocks, dtype=torch.float64, device=r.device)
    given = (r.contiguous(), a.contiguous(), b.contiguous(), cu_seqlens, sums)
    sizes = (stabilizer, size, per_block, blocks)
    flags = dict(PACKED=packed, STABILIZED=stabilizer != 0, BLOCK=BLOCK, num_warps=8)
    with on(r.device):
        if rescale:
            _add_relevance_sums_kernel[(examples * blocks,)](*given, *sizes, **flags)
        _add_relevance_kernel[(examples * blocks,)](
            *given, r_a, r_b, *sizes, RESCALE=rescale, BLOCKS=MAX_BLOCKS, **flags
        )
    return r_a, r_b

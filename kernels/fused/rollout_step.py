"""One layer of the rollout in row mode: out[t, j] = sum_i r[t, i] rstd[i] norm0[i, j].

The norms norm0 are those of `_pairs` and are not stored (Modarressi et al., 2022, eq. 6 to 10). A program
takes BLOCK_J keys and a share of the queries. A second kernel adds the shares and scales the rows, so that no
atomics are needed and results repeat bit for bit. A pair takes H*(dh + H) multiply-adds on tensor cores and H
exponentials, with the heads padded to a power of two. q is read once for every block of keys, everything else
once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.launch import query_shares
from pyglobenc.backends.shared.packing import on_device
from pyglobenc.kernels._device import COUNTS, on, power_of_two, real_tokens
from pyglobenc.kernels._pairs import (
    START,
    hold_keys,
    load_gram,
    own_term,
    pair_arguments,
    pair_reasons,
    places,
    strides,
    tile_norms,
)

# Number of rows of the rollout that one pass handles; more rows take more passes.
MAX_ROWS = 64
# Entries of a row that a program of the second kernel scales at a time.
BLOCK = 1024


@triton.jit
def _sequences(CU_SEQLENS, sequences, j, j_ok, n, STEPS: tl.constexpr):
    """Return the start and the end of the tokens of each key's sequence, (keys,) each.

    Keys that are not ok get n and 0.
    """
    if STEPS:
        low = tl.zeros_like(j)
        high = low + sequences
        # The loop is unrolled. Otherwise the kernel takes 255 registers instead of 162, and spills.
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            after = tl.load(CU_SEQLENS + middle, mask=j_ok, other=0) > j
            low, high = tl.where(after, low, middle), tl.where(after, middle, high)
        return tl.load(CU_SEQLENS + low, mask=j_ok, other=n), tl.load(
            CU_SEQLENS + low + 1, mask=j_ok, other=0
        )
    else:
        return tl.where(j_ok, 0, n), tl.where(j_ok, n, 0)


@triton.jit
def _queries(
    block, start_j, stop_j, left, right, share, shares, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Return the start and the end of one share of the queries that see a key of the block.

    A share is a whole number of tiles.
    """
    first = tl.maximum(tl.min(start_j, 0), block * BLOCK_J - right) // BLOCK_I * BLOCK_I
    last = tl.maximum(first, tl.minimum(tl.max(stop_j, 0), (block + 1) * BLOCK_J + left))
    per_share = tl.cdiv(tl.cdiv(last - first, BLOCK_I), shares) * BLOCK_I
    return first + share * per_share, tl.minimum(last, first + (share + 1) * per_share)


@triton.jit
def _accumulate(acc, norms, weights, BLOCK_T: tl.constexpr, FORM: tl.constexpr):
    """Return acc + norms @ weights of a tile, (keys, rows of the rollout)."""
    if BLOCK_T == 1:
        acc += tl.sum(norms * tl.sum(weights, 1)[None, :], 1)[:, None]
    else:
        acc = tl.dot(norms, weights, acc, input_precision=FORM)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _rollout_step_kernel(
    R,  # (B, T, n)
    Q,  # (B, H, n, dh)
    K,  # (B, Hkv, n, dh)
    LSE,  # (B, H, n)
    GRAM,  # (B, n, H, H)
    CROSS,  # (B, n, H)
    RESIDUAL_SQ,  # (B, n)
    RSTD,  # (B, n)
    MASK,  # (B, n)
    CU_SEQLENS,  # (S + 1,): where each of the sequences packed into one begins, and n
    OUT,  # (shares, B, T, n)
    scaling, n, n_heads, group, n_rows, left, right, key_blocks, row_blocks, shares, batch, sequences,
    stride_rb, stride_rt, stride_rn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_lb, stride_lh, stride_ln, stride_gb, stride_gn, stride_gh, stride_gg, stride_cb, stride_cn,
    stride_ch,
    stride_xb, stride_xn, stride_sb, stride_sn, stride_mb, stride_mn,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, HELD: tl.constexpr, HAS_OWN: tl.constexpr, HAS_RSTD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, STEPS: tl.constexpr, SCORES: tl.constexpr, FORM: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take the same queries, so that these stay in L2.
    block, rest = tl.program_id(0) % key_blocks, tl.program_id(0) // key_blocks
    share, rest = rest % shares, rest // shares
    t = (rest % row_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = (rest // row_blocks).to(tl.int64)
    Q += b * stride_qb
    K += b * stride_kb
    LSE += b * stride_lb
    heads = tl.arange(0, HEADS)
    head_ok = heads < n_heads
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    j_ok = real_tokens(MASK, b, stride_mb, stride_mn, j, j < n, HAS_MASK)
    start_j, stop_j = _sequences(CU_SEQLENS, sequences, j, j_ok, n, STEPS)
    first, last = _queries(block, start_j, stop_j, left, right, share, shares, BLOCK_I, BLOCK_J)
    gram = load_gram(GRAM + b * stride_gb, stride_gn, stride_gh, stride_gg, heads, head_ok, j, j_ok)
    k_held = hold_keys(
        K, stride_kh, stride_kn, heads, head_ok, group, j, j_ok, HEAD_DIM, BLOCK_D, HELD, UPCAST
    )
    own = tl.zeros((BLOCK_J,), tl.float32)
    # Only one share of the queries contains the block's own tokens.
    if HAS_OWN and (first < (block + 1) * BLOCK_J) & (last > block * BLOCK_J):
        own = own_term(Q, K, LSE, CROSS + b * stride_cb, RESIDUAL_SQ + b * stride_xb, stride_qh, stride_qn,
        stride_kh, stride_kn,
                       stride_lh, stride_ln, stride_cn, stride_ch, stride_xn, heads, head_ok, group, j, j_ok,
                       scaling, HEAD_DIM,
                       UPCAST)  # fmt: skip
    acc = tl.zeros((BLOCK_J, BLOCK_T), tl.float32)
    for start in range(first, last, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        i64 = i.to(tl.int64)
        i_ok = real_tokens(MASK, b, stride_mb, stride_mn, i, i < n, HAS_MASK)
        norms = tile_norms(Q, K, LSE, stride_qh, stride_qn, stride_kh, stride_kn, stride_lh, stride_ln, heads,
        head_ok, group, i, i_ok,
                           j, j_ok, k_held, gram, own, scaling, left, right, HEAD_DIM, BLOCK_D, HELD, HAS_OWN,
                           HAS_WINDOW, SCORES,
                           FORM, UPCAST)  # fmt: skip
        if STEPS:
            norms = tl.where((i[None, :] >= start_j[:, None]) & (i[None, :] < stop_j[:, None]), norms, 0.0)
        at = R + b * stride_rb + i64[:, None] * stride_rn + t.to(tl.int64)[None, :] * stride_rt
        weights = tl.load(at, mask=i_ok[:, None] & (t < n_rows)[None, :], other=0.0)
        if HAS_RSTD:
            weights *= tl.load(RSTD + b * stride_sb + i64 * stride_sn, mask=i_ok, other=0.0)[:, None]
        acc = _accumulate(acc, norms, weights, BLOCK_T, FORM)
    acc = tl.where(j_ok[:, None], acc, 0.0)
    OUT += ((share * batch + b) * n_rows + t.to(tl.int64)[None, :]) * n
    tl.store(OUT + j[:, None], acc, mask=(j < n)[:, None] & (t < n_rows)[None, :])


@triton.jit
def _larger(a, b):
    """Return the larger of two values, and NaN if one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _total(PARTS, at, ok, shares, step):
    """Return the sum over the shares, which lie `step` apart, in a fixed order."""
    total = tl.load(PARTS + at, mask=ok, other=0.0)
    for share in range(1, shares):
        total += tl.load(PARTS + share * step + at, mask=ok, other=0.0)
    return total


@triton.jit(do_not_specialize=COUNTS)
def _finish_kernel(
    PARTS,  # (shares, B, T, n); the same memory as OUT if there is one share
    LOG_SCALE,  # (B, T), or (S, T) for packed sequences
    CU_SEQLENS,  # (S + 1,)
    OUT,  # (B, T, n)
    OUT_SCALE,  # (B, T), or (S, T) for packed sequences
    n, n_rows, shares, batch, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Each program scales one row of an example or packed sequence, like rescale_rows of the reference.
    row, first, last = tl.program_id(0).to(tl.int64), 0, n
    if PACKED:
        first, last = tl.load(CU_SEQLENS + row // n_rows), tl.load(CU_SEQLENS + row // n_rows + 1)
        row = row % n_rows
    step = batch.to(tl.int64) * n_rows * n
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        key = start + tl.arange(0, BLOCK)
        top = _larger(top, _total(PARTS, row * n + key, key < last, shares, step))
    top = tl.reduce(top, 0, _larger)
    top = tl.where(top > 0, top, 1.0)
    for start in range(first, last, BLOCK):
        key = start + tl.arange(0, BLOCK)
        total = _total(PARTS, row * n + key, key < last, shares, step)
        tl.store(OUT + row * n + key, tl.div_rn(total, top), mask=key < last)
    tl.store(OUT_SCALE + tl.program_id(0), tl.load(LOG_SCALE + tl.program_id(0)) + tl.log(top))


def why_not(inputs: PairInputs, r: Tensor, log_scale: Tensor) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.rollout_step` can't run here; empty if they can."""
    return pair_reasons(inputs, r=r, log_scale=log_scale)


def run(inputs: PairInputs, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.rollout_step`.

    Returns r @ norms (B, T, n), with each row scaled to maximum 1, and log_scale (B, T).
    """
    batch, n_rows, n = r.shape
    out, out_scale = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (r, log_scale))
    if r.numel() == 0:
        return out, log_scale.clone()
    given = pair_arguments(inputs)
    key_blocks = -(-n // given["BLOCK_J"])
    block_t = 1 if n_rows == 1 else min(MAX_ROWS, power_of_two(n_rows, 16))
    row_blocks = -(-n_rows // block_t)
    examples, longest, steps, cu_seqlens = batch, n, 0, None
    if inputs.cu_seqlens is not None:
        examples, (cu_seqlens, longest) = len(inputs.cu_seqlens) - 1, on_device(inputs.cu_seqlens, r.device)
        # Steps of a binary search among the sequences, rounded up to 8, 16 or 24, so that few variants are
        # compiled.
        steps = -(-max(1, (examples - 1).bit_length()) // 8) * 8
    shares = query_shares(
        key_blocks * row_blocks * batch, -(-longest // given["BLOCK_I"]), places(r.device), START
    )
    parts = out if shares == 1 else r.new_empty(shares, *r.shape)
    given |= dict(
        R=r,
        CU_SEQLENS=cu_seqlens,
        OUT=parts,
        n_rows=n_rows,
        key_blocks=key_blocks,
        row_blocks=row_blocks,
        shares=shares,
        batch=batch,
    )
    with on(r.device):
        _rollout_step_kernel[(key_blocks * shares * row_blocks * batch,)](
            **given, sequences=examples, BLOCK_T=block_t, STEPS=steps, **strides(r, "rb rt rn")
        )
        _finish_kernel[(examples * n_rows,)](
            parts,
            log_scale.contiguous(),
            cu_seqlens,
            out,
            out_scale,
            n,
            n_rows,
            shares,
            batch,
            PACKED=steps > 0,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return out, out_scale

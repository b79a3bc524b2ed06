"""One layer of the rollout in row mode, fused: out[t, j] = sum_i r[t, i] rstd[i] norm0[i, j], norms rebuilt tile by tile, never stored.

The norms are those of `_pairs` (Modarressi et al., 2022, eq. 6 to 10, expanded over heads). A program owns BLOCK_J keys and a share of
the queries; shares are summed afterwards, so there are no atomics and a run repeats bit for bit. H*(dh + H) multiply-adds on tensor
cores and H exponentials a pair, heads padded to a power of two; q is read once for every block of keys, everything else once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.grids import query_shares
from pyglobenc.kernels._device import COUNTS, on, power_of_two, real_tokens
from pyglobenc.kernels._pairs import START, hold_keys, load_gram, own_term, pair_arguments, pair_norms, pair_reasons, places, strides
from pyglobenc.reference.packing import sequence_of

# rows of the rollout that one pass carries; more rows take more passes
MAX_ROWS = 64


@triton.jit
def _sequences(SPANS, j, j_ok, n, PACKED: tl.constexpr):
    """First and last + 1 token of each key's sequence, (keys,) each; n and 0 of a key that doesn't count."""
    if PACKED:
        return tl.load(SPANS + j, mask=j_ok, other=n), tl.load(SPANS + n + j, mask=j_ok, other=0)
    else:
        return tl.where(j_ok, 0, n), tl.where(j_ok, n, 0)


@triton.jit
def _queries(block, start_j, stop_j, left, right, share, shares, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """First and last + 1 of a share of the queries that see a key of the block; shares are whole tiles."""
    first = tl.maximum(tl.min(start_j, 0), block * BLOCK_J - right) // BLOCK_I * BLOCK_I
    last = tl.maximum(first, tl.minimum(tl.max(stop_j, 0), (block + 1) * BLOCK_J + left))
    per_share = tl.cdiv(tl.cdiv(last - first, BLOCK_I), shares) * BLOCK_I
    return first + share * per_share, tl.minimum(last, first + (share + 1) * per_share)


@triton.jit
def _accumulate(acc, norms, weights, BLOCK_T: tl.constexpr, FORM: tl.constexpr):
    """acc + norms weights of a tile: (keys, rows of the rollout)."""
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
    SPANS,  # (2, n): first and last + 1 token of each token's sequence, where several are packed into one
    OUT,  # (shares, B, T, n)
    scaling, n, n_heads, group, n_rows, left, right, key_blocks, row_blocks, shares, batch,
    stride_rb, stride_rt, stride_rn, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_lb, stride_lh, stride_ln, stride_gb, stride_gn, stride_gh, stride_gg, stride_cb, stride_cn, stride_ch,
    stride_xb, stride_xn, stride_sb, stride_sn, stride_mb, stride_mn,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, HELD: tl.constexpr, HAS_OWN: tl.constexpr, HAS_RSTD: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr, SCORES: tl.constexpr, FORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # neighbours in the grid share their queries, so that they meet in L2
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
    start_j, stop_j = _sequences(SPANS, j, j_ok, n, PACKED)
    first, last = _queries(block, start_j, stop_j, left, right, share, shares, BLOCK_I, BLOCK_J)
    gram = load_gram(GRAM + b * stride_gb, stride_gn, stride_gh, stride_gg, heads, head_ok, j, j_ok)
    k_held = hold_keys(K, stride_kh, stride_kn, heads, head_ok, group, j, j_ok, HEAD_DIM, BLOCK_D, HELD, UPCAST)
    own = tl.zeros((BLOCK_J,), tl.float32)
    # only one share meets its own keys
    if HAS_OWN and (first < (block + 1) * BLOCK_J) & (last > block * BLOCK_J):
        own = own_term(Q, K, LSE, CROSS + b * stride_cb, RESIDUAL_SQ + b * stride_xb, stride_qh, stride_qn, stride_kh, stride_kn,
                       stride_lh, stride_ln, stride_cn, stride_ch, stride_xn, heads, head_ok, group, j, j_ok, scaling, HEAD_DIM,
                       UPCAST)  # fmt: skip
    acc = tl.zeros((BLOCK_J, BLOCK_T), tl.float32)
    for start in range(first, last, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        i64 = i.to(tl.int64)
        i_ok = real_tokens(MASK, b, stride_mb, stride_mn, i, i < n, HAS_MASK)
        norms = pair_norms(Q, K, LSE, stride_qh, stride_qn, stride_kh, stride_kn, stride_lh, stride_ln, heads, head_ok, group, i, i_ok,
                           j, j_ok, k_held, gram, own, scaling, left, right, HEAD_DIM, BLOCK_D, HELD, HAS_OWN, HAS_WINDOW, SCORES,
                           FORM, UPCAST)  # fmt: skip
        if PACKED:
            norms = tl.where((i[None, :] >= start_j[:, None]) & (i[None, :] < stop_j[:, None]), norms, 0.0)
        at = R + b * stride_rb + i64[:, None] * stride_rn + t.to(tl.int64)[None, :] * stride_rt
        weights = tl.load(at, mask=i_ok[:, None] & (t < n_rows)[None, :], other=0.0)
        if HAS_RSTD:
            weights *= tl.load(RSTD + b * stride_sb + i64 * stride_sn, mask=i_ok, other=0.0)[:, None]
        acc = _accumulate(acc, norms, weights, BLOCK_T, FORM)
    acc = tl.where(j_ok[:, None], acc, 0.0)
    OUT += ((share * batch + b) * n_rows + t.to(tl.int64)[None, :]) * n
    tl.store(OUT + j[:, None], acc, mask=(j < n)[:, None] & (t < n_rows)[None, :])


def not_supported(r, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window, offsets=None) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    others = dict(r=r, k=k, lse=lse, cross=cross, residual_sq=residual_sq, rstd=rstd, key_mask=key_mask)
    return pair_reasons(q, gram, others)


def rollout_step(
    r: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    residual_sq: Tensor | None,
    rstd: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    offsets: Tensor | None = None,
) -> Tensor:
    """See `pyglobenc.ops.rollout_step`: -> r @ norms (B, T, n), not yet rescaled."""
    batch, n_rows, n = r.shape
    if r.numel() == 0:
        return torch.empty_like(r)
    given = pair_arguments(q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window)
    key_blocks = triton.cdiv(n, given["BLOCK_J"])
    block_t = 1 if n_rows == 1 else min(MAX_ROWS, power_of_two(n_rows, 16))
    row_blocks = triton.cdiv(n_rows, block_t)
    longest = n if offsets is None else int(offsets.diff().max())
    shares = query_shares(key_blocks * row_blocks * batch, triton.cdiv(longest, given["BLOCK_I"]), places(q.device), START)
    out = r.new_empty(shares, batch, n_rows, n)
    spans = None if offsets is None else _spans(offsets, q.device)
    with on(q.device):
        _rollout_step_kernel[(key_blocks * shares * row_blocks * batch,)](
            **given, R=r, SPANS=spans, OUT=out, n_rows=n_rows, key_blocks=key_blocks, row_blocks=row_blocks, shares=shares, batch=batch,
            BLOCK_T=block_t, PACKED=offsets is not None, **strides(r, "rb rt rn"),
        )  # fmt: skip
    return out.sum(0) if shares > 1 else out[0]


def _spans(offsets: Tensor, device: torch.device) -> Tensor:
    """First and last + 1 token of the sequence of every token, (2, N) int32."""
    sequence = sequence_of(offsets, offsets.device)
    return torch.stack([offsets[:-1][sequence], offsets[1:][sequence]]).to(device, non_blocking=True)

"""Norms of all (query, key) pairs, or of chosen queries.

The kernel scales the norms of `_pairs` by row and writes each of them once.

(Modarressi et al., 2022, eq. 6 to 10, expanded over heads.) A program takes BLOCK_J keys and a share of the
queries. A pair takes H*(dh + H) multiply-adds on tensor cores and H exponentials, with the heads padded to a
power of two. One float32 is written for each pair.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.launch import query_shares
from pyglobenc.kernels._device import COUNTS, on, real_tokens
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


@triton.jit(do_not_specialize=COUNTS)
def _pair_norms_kernel(
    Q,  # (B, H, n, dh)
    K,  # (B, Hkv, n, dh)
    LSE,  # (B, H, n)
    GRAM,  # (B, n, H, H)
    CROSS,  # (B, n, H)
    RESIDUAL_SQ,  # (B, n)
    RSTD,  # (B, n)
    MASK,  # (B, n)
    ROWS,  # (B, m)
    OUT,  # (B, m, n)
    scaling, n, m, n_heads, group, left, right, key_blocks, shares,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_lb, stride_lh, stride_ln,
    stride_gb, stride_gn, stride_gh, stride_gg, stride_cb, stride_cn, stride_ch,
    stride_xb, stride_xn, stride_sb, stride_sn, stride_mb, stride_mn, stride_rb, stride_rn,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HELD: tl.constexpr, HAS_OWN: tl.constexpr, HAS_RSTD: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SCORES: tl.constexpr, FORM: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block, rest = tl.program_id(0) % key_blocks, tl.program_id(0) // key_blocks
    share = rest % shares
    b = (rest // shares).to(tl.int64)
    Q += b * stride_qb
    K += b * stride_kb
    LSE += b * stride_lb
    heads = tl.arange(0, HEADS)
    head_ok = heads < n_heads
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    j_ok = real_tokens(MASK, b, stride_mb, stride_mn, j, j < n, HAS_MASK)
    gram = load_gram(GRAM + b * stride_gb, stride_gn, stride_gh, stride_gg, heads, head_ok, j, j_ok)
    k_held = hold_keys(
        K, stride_kh, stride_kn, heads, head_ok, group, j, j_ok, HEAD_DIM, BLOCK_D, HELD, UPCAST
    )
    own = 0.0
    if HAS_OWN:
        own = own_term(Q, K, LSE, CROSS + b * stride_cb, RESIDUAL_SQ + b * stride_xb, stride_qh, stride_qn,
        stride_kh, stride_kn,
                       stride_lh, stride_ln, stride_cn, stride_ch, stride_xn, heads, head_ok, group, j, j_ok,
                       scaling, HEAD_DIM,
                       UPCAST)  # fmt: skip
    per_share = tl.cdiv(tl.cdiv(m, BLOCK_I), shares) * BLOCK_I
    for start in range(share * per_share, tl.minimum(m, (share + 1) * per_share), BLOCK_I):
        row = start + tl.arange(0, BLOCK_I)
        row_ok = row < m
        i = row
        if HAS_ROWS:
            i = tl.load(ROWS + b * stride_rb + row * stride_rn, mask=row_ok, other=0).to(tl.int32)
        i64 = i.to(tl.int64)
        i_ok = real_tokens(MASK, b, stride_mb, stride_mn, i, row_ok, HAS_MASK)
        norms = tile_norms(Q, K, LSE, stride_qh, stride_qn, stride_kh, stride_kn, stride_lh, stride_ln, heads,
        head_ok, group, i, i_ok,
                           j, j_ok, k_held, gram, own, scaling, left, right, HEAD_DIM, BLOCK_D, HELD, HAS_OWN,
                           HAS_WINDOW, SCORES,
                           FORM, UPCAST)  # fmt: skip
        if HAS_RSTD:
            norms *= tl.load(RSTD + b * stride_sb + i64 * stride_sn, mask=i_ok, other=0.0)[None, :]
        norms = tl.where(i_ok[None, :] & j_ok[:, None], norms, 0.0)
        at = OUT + (b * m + row.to(tl.int64)[None, :]) * n + j[:, None]
        tl.store(at, norms, mask=row_ok[None, :] & (j < n)[:, None])


def why_not(inputs: PairInputs, rows: Tensor | None) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.pair_norms` can't run here; empty if they can."""
    return pair_reasons(inputs, rows=rows)


def run(inputs: PairInputs, rows: Tensor | None) -> Tensor:
    """See `pyglobenc.ops.pair_norms`: -> (B, n, n), or (B, T, n) with rows."""
    batch, n = inputs.gram.shape[:2]
    m = n if rows is None else rows.shape[1]
    out = inputs.gram.new_empty(batch, m, n)
    if out.numel() == 0:
        return out
    given = pair_arguments(inputs)
    key_blocks = -(-n // given["BLOCK_J"])
    shares = query_shares(key_blocks * batch, -(-m // given["BLOCK_I"]), places(out.device), START)
    with on(out.device):
        _pair_norms_kernel[(key_blocks * shares * batch,)](
            **given,
            ROWS=rows,
            OUT=out,
            m=m,
            key_blocks=key_blocks,
            shares=shares,
            HAS_ROWS=rows is not None,
            **strides(rows, "rb rn"),
        )
    return out

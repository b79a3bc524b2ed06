"""Tiles of relevance through attention, one head at a time: what the three relevance kernels over pairs share.

    alpha[i,j] = exp(scaling q[i].k[j] - lse[i]),   R_alpha[i,j] = alpha[i,j] <s[i], v[j]> / 2,   A_h = max(<grad_o[i], v[j]> R_alpha, 0)

(Chefer et al., 2021, eq. 13; the published code's matmul rule.) The scores are what a later division sees, and it amplifies their
rounding up to 1e7 times: they are float32 products on CUDA cores always, the rest as precise as the caller's float32 is.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.kernels._device import MAX_HEAD_DIM, power_of_two, registers
from pyglobenc.kernels._division import float32_reasons


@triton.jit
def load_rows(X, stride_n, rows, row_ok, d, HEAD_DIM: tl.constexpr):
    """X[row, d] as (rows, d), 0 outside."""
    offsets = rows.to(tl.int64)[:, None] * stride_n + d[None, :]
    return tl.load(X + offsets, mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(X, stride_n, rows, row_ok, d, x, HEAD_DIM: tl.constexpr):
    """The reverse of load_rows."""
    offsets = rows.to(tl.int64)[:, None] * stride_n + d[None, :]
    tl.store(X + offsets, x, mask=row_ok[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def pair_relevance(
    Q, K, V, S, GRAD, LSE, stride_qn, stride_kn, stride_vn, stride_sn, stride_gn, stride_ln, i, i_ok, j, j_ok, scaling, left, right,
    HEAD_DIM: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_WINDOW: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """q . k unscaled, alpha, R_alpha and A_h of a tile of one head, each (queries, keys)."""
    dots = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    relevance = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    weighted = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    # products on CUDA cores keep a whole row in registers: a few columns at a time
    for start in range(0, HEAD_DIM, 16):
        d = start + tl.arange(0, 16)
        k = load_rows(K, stride_kn, j, j_ok, d, HEAD_DIM)
        dots = tl.dot(load_rows(Q, stride_qn, i, i_ok, d, HEAD_DIM), tl.trans(k), dots, input_precision="ieee")
        v = tl.trans(load_rows(V, stride_vn, j, j_ok, d, HEAD_DIM))
        relevance = tl.dot(load_rows(S, stride_sn, i, i_ok, d, HEAD_DIM), v, relevance, input_precision=PRODUCTS)
        if HAS_GRAD:
            weighted = tl.dot(load_rows(GRAD, stride_gn, i, i_ok, d, HEAD_DIM), v, weighted, input_precision=PRODUCTS)
    seen = i_ok[:, None] & j_ok[None, :]
    if HAS_WINDOW:
        seen = seen & (j[None, :] - i[:, None] <= right) & (i[:, None] - j[None, :] <= left)
    lse = tl.load(LSE + i.to(tl.int64) * stride_ln, mask=i_ok, other=0.0)
    # scores of hidden keys are not in lse: their exponential may be inf
    alpha = tl.where(seen, tl.exp(dots * scaling - lse[:, None]), 0.0)
    relevance *= alpha * 0.5
    weighted = weighted * relevance if HAS_GRAD else relevance
    return dots, alpha, relevance, tl.maximum(weighted, 0.0)


def launch(head_dim: int) -> dict[str, int]:
    """Tile sizes and warps for a head size: the largest that don't spill in Triton 3.6 and 3.9, where the products of scores bind.

    Operands of products on CUDA cores live in registers: 32 by 32 pairs spill for some head size in one of the two versions, and
    shared memory, 16 KB, never binds. Without a cap on registers ptxas spills a few to stay at 128.
    """
    whole = power_of_two(head_dim, 16)
    tile = dict(BLOCK_I=32 if whole <= 128 else 16, BLOCK_J=16, BLOCK_D=whole)
    return tile | dict(num_warps=8, num_stages=1) | registers(255)


def relevance_reasons(q: Tensor, **others: Tensor | None) -> list[str]:
    """Why a relevance kernel over pairs can't run on these tensors."""
    reasons = float32_reasons(q=q, **others)
    if q.shape[3] > MAX_HEAD_DIM:
        reasons.append(f"takes heads of up to {MAX_HEAD_DIM}, got {q.shape[3]}")
    return reasons


def by_head(t: Tensor | None, like: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A (B, H, n, dh) tensor with its last axis contiguous and its first three strides; `like` stands in for an absent one."""
    t = like if t is None else t
    t = t if t.stride(-1) == 1 else t.contiguous()
    return t, t.stride()[:3]

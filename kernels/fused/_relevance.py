"""Tiles of relevance through attention for one head, which the three relevance kernels over pairs share.

    alpha[i,j]   = exp(scaling q[i].k[j] - lse[i])
    R_alpha[i,j] = alpha[i,j] <s[i], v[j]> / 2
    A_h[i,j]     = max(<grad_o[i], v[j]> R_alpha[i,j], 0)

(Chefer et al., 2021, eq. 13, and the matmul rule of the published code.) A later division by the scores
amplifies their rounding up to 1e7 times. So the scores are always float32 products on CUDA cores; the other
products have the precision that the caller allows.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.kernels._device import MAX_HEAD_DIM, positive_part, power_of_two, registers
from pyglobenc.kernels._division import float32_reasons


@triton.jit
def load_rows(X, stride_n, rows, row_ok, d, HEAD_DIM: tl.constexpr):
    """Load X[row, d] as (rows, d); 0 outside."""
    offsets = rows.to(tl.int64)[:, None] * stride_n + d[None, :]
    return tl.load(X + offsets, mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(X, stride_n, rows, row_ok, d, x, HEAD_DIM: tl.constexpr):
    """Store x where load_rows would load it."""
    offsets = rows.to(tl.int64)[:, None] * stride_n + d[None, :]
    tl.store(X + offsets, x, mask=row_ok[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def pair_relevance(
    Q, K, V, S, GRAD, LSE, stride_qn, stride_kn, stride_vn, stride_sn, stride_gn, stride_ln, i, i_ok, j, j_ok,
    scaling, left, right,
    HEAD_DIM: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_WINDOW: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Return unscaled q . k, alpha, R_alpha and A_h of a tile of one head, each (queries, keys)."""
    dots = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    relevance = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    weighted = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    # Products on CUDA cores keep whole rows in registers, so only a few columns are loaded at a time.
    for start in range(0, HEAD_DIM, 16):
        d = start + tl.arange(0, 16)
        k = load_rows(K, stride_kn, j, j_ok, d, HEAD_DIM)
        dots = tl.dot(
            load_rows(Q, stride_qn, i, i_ok, d, HEAD_DIM), tl.trans(k), dots, input_precision="ieee"
        )
        v = tl.trans(load_rows(V, stride_vn, j, j_ok, d, HEAD_DIM))
        relevance = tl.dot(
            load_rows(S, stride_sn, i, i_ok, d, HEAD_DIM), v, relevance, input_precision=PRODUCTS
        )
        if HAS_GRAD:
            weighted = tl.dot(
                load_rows(GRAD, stride_gn, i, i_ok, d, HEAD_DIM), v, weighted, input_precision=PRODUCTS
            )
    seen = i_ok[:, None] & j_ok[None, :]
    if HAS_WINDOW:
        seen = seen & (j[None, :] - i[:, None] <= right) & (i[:, None] - j[None, :] <= left)
    lse = tl.load(LSE + i.to(tl.int64) * stride_ln, mask=i_ok, other=0.0)
    # lse does not include the scores of hidden keys, so their exponential may be infinite.
    alpha = tl.where(seen, tl.exp(dots * scaling - lse[:, None]), 0.0)
    relevance *= alpha * 0.5
    weighted = weighted * relevance if HAS_GRAD else relevance
    return dots, alpha, relevance, positive_part(weighted)


def launch(head_dim: int) -> dict[str, int]:
    """Return tile sizes and warps for a head size: the largest tiles that do not spill in Triton 3.6 and 3.9.

    Operands of products on CUDA cores live in registers, and 32 by 32 pairs spill for some head sizes. Shared
    memory, 16 KB, is no limit. Without the limit on registers, ptxas spills a few to stay at 128.
    """
    whole = power_of_two(head_dim, 16)
    tile = dict(BLOCK_I=32 if whole <= 128 else 16, BLOCK_J=16, BLOCK_D=whole)
    return tile | dict(num_warps=8, num_stages=1) | registers(255)


def relevance_reasons(inputs: RelevanceInputs, other: Tensor | None) -> list[str]:
    """Return why a relevance kernel over pairs can't run on these inputs and the op's other tensor."""
    reasons, head_dim = float32_reasons(**inputs.tensors(), other=other), inputs.q.shape[3]
    reasons += inputs.reference_alone()
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"takes heads of up to {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


def by_head(t: Tensor | None, like: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return t (B, H, n, dh) with its last axis contiguous, and its first three strides.

    If t is None, `like` takes its place.
    """
    t = like if t is None else t
    t = t if t.stride(-1) == 1 else t.contiguous()
    return t, t.stride()[:3]

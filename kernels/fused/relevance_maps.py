"""The map of one layer that the rollout multiplies, A[i,j] = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0).

(Chefer et al., 2021, eq. 13.) A program computes one tile of the map and loops over the heads. The map takes
3 n^2 d multiply-adds, and one float32 is written for each pair.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.masks import sides
from pyglobenc.kernels._device import COUNTS, float32_precision, on, real_tokens
from pyglobenc.kernels._relevance import by_head, launch, pair_relevance
from pyglobenc.kernels._relevance import relevance_reasons as why_not

__all__ = ["run", "why_not"]


@triton.jit(do_not_specialize=COUNTS)
def _relevance_maps_kernel(
    Q,  # (B, H, n, dh)
    K,  # (B, H, n, dh)
    V,  # (B, H, n, dh)
    S,  # (B, H, n, dh)
    GRAD,  # (B, H, n, dh)
    LSE,  # (B, H, n)
    MASK,  # (B, n)
    ROWS,  # (B, m)
    OUT,  # (B, m, n)
    scaling, n, m, n_heads, left, right, row_blocks, key_blocks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_sn, stride_gb, stride_gh, stride_gn, stride_lb, stride_lh, stride_ln,
    stride_mb, stride_mn,
    stride_rb, stride_rn,
    HEAD_DIM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, HAS_GRAD: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_WINDOW: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    row_block, rest = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    j = (rest % key_blocks) * BLOCK_J + tl.arange(0, BLOCK_J)
    b = (rest // key_blocks).to(tl.int64)
    j_ok = real_tokens(MASK, b, stride_mb, stride_mn, j, j < n, HAS_MASK)
    row = row_block * BLOCK_I + tl.arange(0, BLOCK_I)
    i_ok = row < m
    i = row
    if HAS_ROWS:
        i = tl.load(ROWS + b * stride_rb + row * stride_rn, mask=i_ok, other=0).to(tl.int32)
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for head in range(0, n_heads):
        h = tl.cast(head, tl.int64)
        grad = S
        if HAS_GRAD:
            grad = GRAD + b * stride_gb + h * stride_gh
        _, _, _, weighted = pair_relevance(Q + b * stride_qb + h * stride_qh,
        K + b * stride_kb + h * stride_kh,
                                           V + b * stride_vb + h * stride_vh,
                                           S + b * stride_sb + h * stride_sh, grad,
                                           LSE + b * stride_lb + h * stride_lh, stride_qn, stride_kn,
                                           stride_vn, stride_sn, stride_gn,
                                           stride_ln, i, i_ok, j, j_ok, scaling, left, right, HEAD_DIM,
                                           HAS_GRAD, HAS_WINDOW,
                                           PRODUCTS)  # fmt: skip
        acc += weighted
    at = OUT + (b * m + row.to(tl.int64)[:, None]) * n + j[None, :]
    tl.store(at, acc / n_heads, mask=i_ok[:, None] & (j < n)[None, :])


def run(inputs: RelevanceInputs, rows: Tensor | None) -> Tensor:
    """See `pyglobenc.ops.relevance_maps`: -> (B, n, n), or (B, T, n) with rows."""
    q, lse, key_mask, grad_o = inputs.q, inputs.lse, inputs.key_mask, inputs.grad_o
    batch, heads, n, head_dim = q.shape
    m = n if rows is None else rows.shape[1]
    out = q.new_empty(batch, m, n)
    if out.numel() == 0:
        return out
    tiles = launch(head_dim)
    # This kernel has no product over keys.
    del tiles["BLOCK_D"]
    given, steps = zip(*(by_head(t, q) for t in (q, inputs.k, inputs.v, inputs.s, grad_o)), strict=True)
    row_blocks, key_blocks = -(-m // tiles["BLOCK_I"]), -(-n // tiles["BLOCK_J"])
    with on(q.device):
        _relevance_maps_kernel[(row_blocks * key_blocks * batch,)](
            *given, lse, key_mask, rows, out, inputs.scaling, n, m, heads, *sides(inputs.window, n),
            row_blocks, key_blocks,
            *(step for three in steps for step in three), *lse.stride(), *((0,
            0) if key_mask is None else key_mask.stride()),
            *((0, 0) if rows is None else rows.stride()), HEAD_DIM=head_dim, HAS_GRAD=grad_o is not None,
            HAS_MASK=key_mask is not None, HAS_ROWS=rows is not None, HAS_WINDOW=max(inputs.window) >= 0,
            PRODUCTS=float32_precision(), **tiles,
        )  # fmt: skip
    return out

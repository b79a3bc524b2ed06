"""Relevance through softmax attention, with one step of the rollout of its maps.

    U     = R' / safe(q.k)
    R_q   = q (U k) / 2
    R_k   = k (U^T q) / 2
    R_v   = v (alpha^T s) / 2
    r_out = w (I + mean_h A_h)

The kernels are built like the backward pass of flash attention. (Chefer et al., 2021, eq. 7, 13 and 14, and
the matmul and add rules of the published code.) A pass over rows computes R_q, the row sums of A, and with an
additive mask the sums that its factor needs. A pass over columns computes R_k, R_v and each head's part of
the step. Together they take 9 n^2 d multiply-adds. They store no (n, n) array and use no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.masks import sides
from pyglobenc.backends.shared.relevance_passes import Passes
from pyglobenc.kernels._device import COUNTS, example, float32_precision, on, power_of_two, real_tokens
from pyglobenc.kernels._division import safe_divide
from pyglobenc.kernels._relevance import by_head, launch, load_rows, pair_relevance, store_rows
from pyglobenc.kernels._relevance import relevance_reasons as why_not

__all__ = ["TritonPasses", "run", "why_not"]

# Number of rows of the rollout that one pass over columns handles.
MAX_ROWS = 32


@triton.jit
def _shares_of_scores(relevance, dots, scaling, stabilizer, ADDITIVE: tl.constexpr, STABILIZED: tl.constexpr):
    """Return R' without its factor c, and U."""
    passed = relevance
    if ADDITIVE:
        scores = dots * scaling
        passed = safe_divide(relevance, scores, 0.0, False) * scores
    return passed, safe_divide(passed, dots, stabilizer, STABILIZED)


@triton.jit
def _one_head(CU_SEQLENS, head, n_heads, n, PACKED: tl.constexpr):
    """Return `example` for a program, its head within the example, and the head's index in the results."""
    b, first, n_own = example(CU_SEQLENS, head // n_heads, n, PACKED)
    h = head % n_heads
    if PACKED:
        head = h
    return b, first, n_own, h.to(tl.int64), head


@triton.jit(do_not_specialize=COUNTS)
def _relevance_rows_kernel(
    Q,  # (B, H, n, dh)
    K,  # (B, H, n, dh)
    V,  # (B, H, n, dh)
    S,  # (B, H, n, dh)
    GRAD,  # (B, H, n, dh)
    LSE,  # (B, H, n)
    MASK,  # (B, n)
    CU_SEQLENS,  # (S + 1,): where each of the sequences packed into one begins, and n
    R_Q,  # (B, H, n, dh)
    # (1, B, H, n) float64: row sums of A_h. With an additive mask (3, B, H, n), also those of R_alpha and R'.
    SUMS,
    scaling, stabilizer, n, n_heads, left, right, blocks, total_rows,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_sn, stride_gb, stride_gh, stride_gn, stride_lb, stride_lh, stride_ln,
    stride_mb, stride_mn,
    HEAD_DIM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    RELEVANCE: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, PACKED: tl.constexpr,
    ADDITIVE: tl.constexpr,
    STABILIZED: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, first, n_own, h, head = _one_head(CU_SEQLENS, head, n_heads, n, PACKED)
    if PACKED and block * BLOCK_I >= n_own:
        return
    Q += b * stride_qb + h * stride_qh + first * stride_qn
    K += b * stride_kb + h * stride_kh + first * stride_kn
    V += b * stride_vb + h * stride_vh + first * stride_vn
    S += b * stride_sb + h * stride_sh + first * stride_sn
    GRAD += b * stride_gb + h * stride_gh + first * stride_gn
    LSE += b * stride_lb + h * stride_lh + first * stride_ln
    i = block * BLOCK_I + tl.arange(0, BLOCK_I)
    i_ok = i < n_own
    d = tl.arange(0, BLOCK_D)
    # From about 8,192 keys on, float32 sums would lose digits.
    sums = tl.zeros((BLOCK_I,), tl.float64)
    acc = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    before = tl.zeros((BLOCK_I,), tl.float64)
    after = tl.zeros((BLOCK_I,), tl.float64)
    low = tl.maximum(0, block * BLOCK_I - left) // BLOCK_J * BLOCK_J
    for start in range(low, tl.minimum(n_own, (block + 1) * BLOCK_I + right), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        j_ok = real_tokens(MASK, b, stride_mb, stride_mn, j, j < n_own, HAS_MASK)
        dots, _, relevance, weighted = pair_relevance(Q, K, V, S, GRAD, LSE, stride_qn, stride_kn, stride_vn,
        stride_sn, stride_gn,
                                                      stride_ln, i, i_ok, j, j_ok, scaling, left, right,
                                                      HEAD_DIM, HAS_GRAD,
                                                      HAS_WINDOW, PRODUCTS)  # fmt: skip
        sums += tl.sum(weighted, 1).to(tl.float64)
        if RELEVANCE:
            passed, u = _shares_of_scores(relevance, dots, scaling, stabilizer, ADDITIVE, STABILIZED)
            acc = tl.dot(u, load_rows(K, stride_kn, j, j_ok, d, HEAD_DIM), acc, input_precision=PRODUCTS)
            if ADDITIVE:
                before += tl.sum(relevance, 1).to(tl.float64)
                after += tl.sum(passed, 1).to(tl.float64)
    row = head.to(tl.int64) * n + first
    tl.store(SUMS + row + i, sums, mask=i_ok)
    if RELEVANCE:
        r_q = acc * load_rows(Q, stride_qn, i, i_ok, d, HEAD_DIM) * 0.5
        store_rows(R_Q + row * HEAD_DIM, HEAD_DIM, i, i_ok, d, r_q, HEAD_DIM)
        if ADDITIVE:
            tl.store(SUMS + total_rows + row + i, before, mask=i_ok)
            tl.store(SUMS + 2 * total_rows + row + i, after, mask=i_ok)


@triton.jit
def _step(acc, W, stride_t, stride_n, t, t_ok, i, i_ok, weighted, PRODUCTS: tl.constexpr):
    """Return acc + W A_h of a tile, (rows of the rollout, keys)."""
    at = W + t.to(tl.int64)[:, None] * stride_t + i.to(tl.int64)[None, :] * stride_n
    w = tl.load(at, mask=t_ok[:, None] & i_ok[None, :], other=0.0)
    if acc.shape[0] == 1:
        acc += tl.sum(tl.trans(w) * weighted, 0)[None, :]
    else:
        acc = tl.dot(w, weighted, acc, input_precision=PRODUCTS)
    return acc


@triton.jit(do_not_specialize=COUNTS)
def _relevance_columns_kernel(
    Q,  # (B, H, n, dh)
    K,  # (B, H, n, dh)
    V,  # (B, H, n, dh)
    S,  # (B, H, n, dh)
    GRAD,  # (B, H, n, dh)
    LSE,  # (B, H, n)
    MASK,  # (B, n)
    CU_SEQLENS,  # (S + 1,): where each of the sequences packed into one begins, and n
    W,  # (B, T, n): rows of the rollout, divided by the sums if they are to be
    R_K,  # (B, H, n, dh)
    R_V,  # (B, H, n, dh)
    OUT,  # (B, H, T, n): W A_h
    scaling, stabilizer, n, n_heads, left, right, blocks, n_rows,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_sb, stride_sh, stride_sn,
    stride_gb, stride_gh, stride_gn, stride_lb, stride_lh, stride_ln, stride_mb, stride_mn, stride_wb,
    stride_wt, stride_wn,
    HEAD_DIM: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    RELEVANCE: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    ADDITIVE: tl.constexpr, STABILIZED: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, first, n_own, h, head = _one_head(CU_SEQLENS, head, n_heads, n, PACKED)
    if PACKED and block * BLOCK_J >= n_own:
        return
    Q += b * stride_qb + h * stride_qh + first * stride_qn
    K += b * stride_kb + h * stride_kh + first * stride_kn
    V += b * stride_vb + h * stride_vh + first * stride_vn
    S += b * stride_sb + h * stride_sh + first * stride_sn
    GRAD += b * stride_gb + h * stride_gh + first * stride_gn
    LSE += b * stride_lb + h * stride_lh + first * stride_ln
    j = block * BLOCK_J + tl.arange(0, BLOCK_J)
    j_ok = real_tokens(MASK, b, stride_mb, stride_mn, j, j < n_own, HAS_MASK)
    acc_k = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    # BLOCK_T is 0 without a rollout step.
    d, t = tl.arange(0, BLOCK_D), tl.arange(0, max(BLOCK_T, 1))
    acc_t = tl.zeros((max(BLOCK_T, 1), BLOCK_J), tl.float32)
    low = tl.maximum(0, block * BLOCK_J - right) // BLOCK_I * BLOCK_I
    high = tl.where(tl.max(j_ok.to(tl.int32), 0) > 0, tl.minimum(n_own, (block + 1) * BLOCK_J + left), low)
    for start in range(low, high, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        i_ok = i < n_own
        dots, alpha, relevance, weighted = pair_relevance(Q, K, V, S, GRAD, LSE, stride_qn, stride_kn,
        stride_vn, stride_sn, stride_gn,
                                                          stride_ln, i, i_ok, j, j_ok, scaling, left, right,
                                                          HEAD_DIM, HAS_GRAD,
                                                          HAS_WINDOW, PRODUCTS)  # fmt: skip
        if BLOCK_T > 0:
            acc_t = _step(
                acc_t,
                W + b * stride_wb + first * stride_wn,
                stride_wt,
                stride_wn,
                t,
                t < n_rows,
                i,
                i_ok,
                weighted,
                PRODUCTS,
            )
        if RELEVANCE:
            _, u = _shares_of_scores(relevance, dots, scaling, stabilizer, ADDITIVE, STABILIZED)
            acc_k = tl.dot(
                tl.trans(u), load_rows(Q, stride_qn, i, i_ok, d, HEAD_DIM), acc_k, input_precision=PRODUCTS
            )
            acc_v = tl.dot(
                tl.trans(alpha),
                load_rows(S, stride_sn, i, i_ok, d, HEAD_DIM),
                acc_v,
                input_precision=PRODUCTS,
            )
    j_in = j < n_own
    if RELEVANCE:
        row = head.to(tl.int64) * n + first
        store_rows(
            R_K + row * HEAD_DIM,
            HEAD_DIM,
            j,
            j_in,
            d,
            acc_k * load_rows(K, stride_kn, j, j_ok, d, HEAD_DIM) * 0.5,
            HEAD_DIM,
        )
        store_rows(
            R_V + row * HEAD_DIM,
            HEAD_DIM,
            j,
            j_in,
            d,
            acc_v * load_rows(V, stride_vn, j, j_ok, d, HEAD_DIM) * 0.5,
            HEAD_DIM,
        )
    if BLOCK_T > 0:
        at = (head.to(tl.int64) * n_rows + t.to(tl.int64)[:, None]) * n + first + j[None, :]
        tl.store(OUT + at, acc_t, mask=(t < n_rows)[:, None] & j_in[None, :])


class TritonPasses(Passes):
    """The two passes in Triton."""

    most_rows = MAX_ROWS

    def launch_rows(self, r_q: Tensor | None, sums: Tensor) -> None:
        self._launch(_relevance_rows_kernel, "BLOCK_I", r_q is not None, (r_q, sums), (sums[0].numel(),))

    def launch_columns(
        self, w: Tensor | None, r_k: Tensor | None, r_v: Tensor | None, step: Tensor | None
    ) -> None:
        count, steps = (0, (0, 0, 0)) if w is None else (w.shape[1], w.stride())
        block_t = count if count < 2 else power_of_two(count, 16)
        tensors = (w, r_k, r_v, step)
        self._launch(
            _relevance_columns_kernel, "BLOCK_J", r_k is not None, tensors, (count,), steps, BLOCK_T=block_t
        )

    def _launch(
        self, kernel, block: str, relevance: bool, tensors: tuple, sizes: tuple, more: tuple = (), **flags
    ) -> None:
        """Launch a program for each head and block; sizes and more follow the common sizes and strides."""
        given = self.inputs
        _, heads, n, head_dim = given.q.shape
        cu_seqlens, examples, longest = self.examples
        tiles = launch(head_dim)
        by_heads, steps = zip(
            *(by_head(t, given.q) for t in (given.q, given.k, given.v, given.s, given.grad_o)), strict=True
        )
        masks = (0, 0) if given.key_mask is None else given.key_mask.stride()
        blocks = -(-longest // tiles[block])
        with on(given.device):
            kernel[(blocks * examples * heads,)](
                *by_heads, given.lse, given.key_mask, cu_seqlens, *tensors, given.scaling, given.stabilizer,
                n, heads,
                *sides(given.window, n), blocks, *sizes, *(step for three in steps for step in three),
                *given.lse.stride(), *masks, *more,
                HEAD_DIM=head_dim, RELEVANCE=relevance, HAS_GRAD=given.grad_o is not None,
                HAS_MASK=given.key_mask is not None,
                HAS_WINDOW=max(given.window) >= 0, PACKED=cu_seqlens is not None,
                ADDITIVE=given.additive_mask,
                STABILIZED=given.stabilizer != 0, PRODUCTS=float32_precision(), **flags, **tiles,
            )  # fmt: skip


def run(inputs: RelevanceInputs, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`.

    Returns R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), and r_out (B, T, n) or None.
    """
    return TritonPasses(inputs).relevance(r)

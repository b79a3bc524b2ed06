"""Gram matrices over heads of the transformed vectors, in one fused kernel.

    G[j][h, g] = v[h, j] K[h, g] v[g, j]^T,   c[j][h] = v[h, j] P[h] x[j]^T

(Modarressi et al., 2022, eq. 6 to 10, with the square expanded over heads.) A program takes one head's values
of a block of tokens. It goes through the heads after it, then through x. G takes n*d^2/2 multiply-adds and c
takes n*d^2, as with torch's GEMMs. These need one or two launches for each head, about 60 a layer for
BERT-base, which limit the speed below a few thousand tokens. They also write v K, n*d floats for each head,
which stays on chip here.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.kernels._device import COUNTS, MAX_HEAD_DIM, float32_precision, on, power_of_two
from pyglobenc.kernels._division import float32_reasons


@triton.jit
def load_block(X, stride_row, rows, row_ok, columns, column_ok):
    """Load X[row, column] as float32, (rows, columns); 0 outside. Columns are contiguous."""
    at = X + rows.to(tl.int64)[:, None] * stride_row + columns[None, :]
    return tl.load(at, mask=row_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def transform(
    V,
    stride_vn,
    W,
    stride_wd,
    j,
    j_ok,
    e,
    e_ok,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Return v @ w for tokens j and columns e, (tokens, columns)."""
    out = tl.zeros((j.shape[0], e.shape[0]), tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v = load_block(V, stride_vn, j, j_ok, d, d < HEAD_DIM)
        out = tl.dot(v, load_block(W, stride_wd, d, d < HEAD_DIM, e, e_ok), out, input_precision=PRODUCTS)
    return out


@triton.jit(do_not_specialize=COUNTS)
def _head_gram_kernel(
    V,  # (B, Hkv, n, dh)
    KERNEL,  # (H, dh, H, dh)
    X,  # (B, n, d)
    CROSS_KERNEL,  # (H, dh, d)
    GRAM,  # (B, n, H, H)
    CROSS,  # (B, n, H)
    n, n_heads, group, width, blocks, stride_vb, stride_vh, stride_vn, stride_xb, stride_xn,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_CROSS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):  # fmt: skip
    # The first heads have the most heads after them, so their programs start first.
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch = tl.num_programs(0) // (blocks * n_heads)
    b, h = (rest % batch).to(tl.int64), rest // batch
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    j_ok = j < n
    V += b * stride_vb
    own = V + (h // group).to(tl.int64) * stride_vh
    row = n_heads * HEAD_DIM
    KERNEL += h.to(tl.int64) * HEAD_DIM * row
    GRAM += (b * n + j.to(tl.int64)) * n_heads * n_heads
    for g in range(h, n_heads):
        acc = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, HEAD_DIM, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            mixed = transform(
                own,
                stride_vn,
                KERNEL + g * HEAD_DIM,
                row,
                j,
                j_ok,
                e,
                e < HEAD_DIM,
                HEAD_DIM,
                BLOCK_D,
                PRODUCTS,
            )
            acc += tl.sum(
                mixed
                * load_block(V + (g // group).to(tl.int64) * stride_vh, stride_vn, j, j_ok, e, e < HEAD_DIM),
                1,
            )
        tl.store(GRAM + h * n_heads + g, acc, mask=j_ok)
        tl.store(GRAM + g * n_heads + h, acc, mask=j_ok)
    if HAS_CROSS:
        acc = tl.zeros((BLOCK_N,), tl.float32)
        CROSS_KERNEL += h.to(tl.int64) * HEAD_DIM * width
        for start in range(0, width, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            mixed = transform(
                own, stride_vn, CROSS_KERNEL, width, j, j_ok, e, e < width, HEAD_DIM, BLOCK_D, PRODUCTS
            )
            acc += tl.sum(mixed * load_block(X + b * stride_xb, stride_xn, j, j_ok, e, e < width), 1)
        tl.store(CROSS + (b * n + j.to(tl.int64)) * n_heads + h, acc, mask=j_ok)


def launch(head_dim: int) -> dict[str, int]:
    """Return tile sizes and warps for a head size.

    With 512 tokens there are 16 blocks for each head, which are enough programs to fill a GPU.
    """
    return dict(
        BLOCK_N=32, BLOCK_D=min(64, power_of_two(head_dim, 16)), BLOCK_E=32, num_warps=4, num_stages=1
    )


def width_reasons(v: Tensor) -> list[str]:
    """Return why a kernel can't run on values v (B, Hkv, n, dh) of this head size; empty if it can."""
    return [f"takes heads of up to {MAX_HEAD_DIM}, got {v.shape[3]}"] if v.shape[3] > MAX_HEAD_DIM else []


def why_not(
    v: Tensor, kernel: Tensor, x: Tensor | None = None, cross_kernel: Tensor | None = None
) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.head_gram` can't run here; empty if they can."""
    return float32_reasons({"v": v, "x": x}, kernel=kernel, cross_kernel=cross_kernel) + width_reasons(v)


def run(
    v: Tensor, kernel: Tensor, x: Tensor | None = None, cross_kernel: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `pyglobenc.ops.head_gram`: -> G (B, n, H, H), c (B, n, H) or None."""
    (batch, kv_heads, n, head_dim), heads = v.shape, kernel.shape[0]
    gram = kernel.new_empty(batch, n, heads, heads)
    cross = None if x is None else kernel.new_empty(batch, n, heads)
    if gram.numel() == 0 or head_dim == 0:
        return gram.zero_(), None if cross is None else cross.zero_()
    tiles = launch(head_dim)
    blocks = -(-n // tiles["BLOCK_N"])
    v = v if v.stride(-1) == 1 else v.contiguous()
    width, steps = 0, (0, 0)
    if x is not None:
        x, cross_kernel = x if x.stride(-1) == 1 else x.contiguous(), cross_kernel.contiguous()
        width, steps = x.shape[2], x.stride()[:2]
    with on(v.device):
        _head_gram_kernel[(blocks * heads * batch,)](
            v, kernel.contiguous(), x, cross_kernel, gram, cross, n, heads, heads // kv_heads, width, blocks,
            *v.stride()[:3], *steps,
            HEAD_DIM=head_dim, HAS_CROSS=x is not None, PRODUCTS=float32_precision(), **tiles,
        )  # fmt: skip
    return gram, cross

"""Norms of the transformed vectors f[h, j] = v[h, j] W_O[h], fused (Kobayashi et al., 2020, eq. 5).

The kernel takes n*d^2 multiply-adds. f, which has n*d floats for each head, stays on chip. One launch
replaces two for each head.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.kernels._device import COUNTS, float32_precision, on
from pyglobenc.kernels._division import float32_reasons
from pyglobenc.kernels.head_gram import launch, transform, width_reasons


@triton.jit(do_not_specialize=COUNTS)
def _head_norms_kernel(
    V,  # (B, Hkv, n, dh)
    WEIGHT,  # (H, dh, d)
    OUT,  # (B, n, H)
    n, n_heads, group, width, blocks, stride_vb, stride_vh, stride_vn,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRODUCTS: tl.constexpr,
):  # fmt: skip
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h, b = rest % n_heads, (rest // n_heads).to(tl.int64)
    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    j_ok = j < n
    V += b * stride_vb + (h // group).to(tl.int64) * stride_vh
    WEIGHT += h.to(tl.int64) * HEAD_DIM * width
    # Squares of float32 numbers can lie outside the range of float32.
    acc = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, width, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        f = transform(V, stride_vn, WEIGHT, width, j, j_ok, e, e < width, HEAD_DIM, BLOCK_D, PRODUCTS).to(
            tl.float64
        )
        acc += tl.sum(f * f, 1)
    tl.store(OUT + (b * n + j.to(tl.int64)) * n_heads + h, tl.sqrt(acc).to(tl.float32), mask=j_ok)


def why_not(v: Tensor, weight: Tensor) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.head_norms` can't run here; empty if they can."""
    return float32_reasons(v=v, weight=weight) + width_reasons(v)


def run(v: Tensor, weight: Tensor) -> Tensor:
    """See `pyglobenc.ops.head_norms`: v (B, Hkv, n, dh), weight (H, dh, d) -> (B, n, H)."""
    (batch, kv_heads, n, head_dim), (heads, _, width) = v.shape, weight.shape
    out = v.new_empty(batch, n, heads)
    if out.numel() == 0 or head_dim == 0:
        return out.zero_()
    tiles = launch(head_dim)
    blocks = -(-n // tiles["BLOCK_N"])
    v = v if v.stride(-1) == 1 else v.contiguous()
    with on(v.device):
        _head_norms_kernel[(blocks * heads * batch,)](
            v, weight.contiguous(), out, n, heads, heads // kv_heads, width, blocks, *v.stride()[:3],
            HEAD_DIM=head_dim, PRODUCTS=float32_precision(), **tiles,
        )  # fmt: skip
    return out

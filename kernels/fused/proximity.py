"""L1 proximity of each key's vectors to the values of rows (Ferrando et al., 2022), fused.

    p[t, j] = max(0, |y[t]|_1 - |y[t] - F|_1),   F = sum_h alpha[h, t, j] f[h, j]

torch computes the vectors f of a block of keys. A program takes a tile of rows and a few keys, and goes
through the features. F stays on chip: its products over the heads run on tensor cores, and each feature adds
min(s, 2 |y| - s), with s = F where y >= 0 and -F elsewhere. The kernel takes T*n*d*H multiply-adds.
"""

import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.shared.proximity_tiles import GPU_KEYS, by_keys
from pyglobenc.kernels._device import COUNTS, MAX_HEADS, float32_precision, on, positive_part, power_of_two
from pyglobenc.kernels._division import float32_reasons

# These depend on the number of tokens, like COUNTS.
STRIDES = ("stride_ab", "stride_ah", "stride_at", "stride_ob", "stride_ot")


@triton.jit(do_not_specialize=(*COUNTS, *STRIDES))
def _proximity_kernel(
    ALPHA,  # (B, H, T, m)
    F,  # (B, H, m, d)
    Y,  # (B, T, d)
    OUT,  # (B, T, m)
    m, n_rows, n_heads, width, key_blocks, row_blocks,
    stride_ab, stride_ah, stride_at, stride_an, stride_fb, stride_fh, stride_fn, stride_yb, stride_yt,
    stride_ob, stride_ot, stride_on,
    BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    PRODUCTS: tl.constexpr,
):  # fmt: skip
    key_block, rest = tl.program_id(0) % key_blocks, tl.program_id(0) // key_blocks
    t = rest % row_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    b = (rest // row_blocks).to(tl.int64)
    j = key_block * BLOCK_J + tl.arange(0, BLOCK_J)
    h = tl.arange(0, BLOCK_H)
    t_ok, j_ok, h_ok = t < n_rows, j < m, h < n_heads
    t, j, h = t.to(tl.int64), j.to(tl.int64), h.to(tl.int64)
    ALPHA += b * stride_ab
    of_alpha = (
        (j * stride_an)[:, None, None] + (t * stride_at)[None, :, None] + (h * stride_ah)[None, None, :]
    )
    seen = j_ok[:, None, None] & t_ok[None, :, None] & h_ok[None, None, :]
    alpha = tl.load(ALPHA + of_alpha, mask=seen, other=0.0)
    F += b * stride_fb
    Y += b * stride_yb
    acc = tl.zeros((BLOCK_J, BLOCK_I), tl.float32)
    for start in range(0, width, BLOCK_D):
        e = start + tl.arange(0, BLOCK_D)
        e_ok = e < width
        of_f = (j * stride_fn)[:, None, None] + (h * stride_fh)[None, :, None] + e[None, None, :]
        held = j_ok[:, None, None] & h_ok[None, :, None] & e_ok[None, None, :]
        f = tl.load(F + of_f, mask=held, other=0.0)
        y = tl.load(Y + (t * stride_yt)[:, None] + e[None, :], mask=t_ok[:, None] & e_ok[None, :], other=0.0)
        vectors = alpha * f if BLOCK_H == 1 else tl.dot(alpha, f, input_precision=PRODUCTS)
        signed = tl.where((y < 0)[None, :, :], -vectors, vectors)
        other = 2 * tl.abs(y)[None, :, :] - signed
        # tl.minimum would lose a NaN of y.
        acc += tl.sum(tl.where(signed < other, signed, other), 2)
    # A key without factors adds nothing, even if its vectors hold NaN.
    acc = tl.where(tl.sum((alpha != 0).to(tl.int32), 2) > 0, acc, 0.0)
    at = OUT + b * stride_ob + (j * stride_on)[:, None] + (t * stride_ot)[None, :]
    tl.store(at, positive_part(acc), mask=j_ok[:, None] & t_ok[None, :])


def launch(heads: int, rows: int) -> dict[str, int]:
    """Return tile sizes and warps. Products of matrices need at least 16 rows and 16 heads."""
    if heads == 1:
        return dict(BLOCK_H=1, BLOCK_I=min(16, power_of_two(rows, 1)), BLOCK_J=8, BLOCK_D=64, num_warps=4)
    # More than 32 heads in 4 warps would need more registers than there are.
    tiles = dict(BLOCK_H=power_of_two(heads, 16), BLOCK_I=32, BLOCK_J=2, BLOCK_D=32, num_stages=1)
    return dict(tiles, num_warps=8 if heads > 32 else 4)


def why_not(alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, per_head: bool) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.proximity` can't run here; empty if they can."""
    reasons = float32_reasons({"v": v}, alpha=alpha, weight=weight, y=y)
    if not per_head and len(weight) > MAX_HEADS:
        reasons.append(f"takes up to {MAX_HEADS} heads, got {len(weight)}")
    return reasons


def run(alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, per_head: bool) -> Tensor:
    """See `pyglobenc.ops.proximity`: -> (B, T, n), or (B, H, T, n) with per_head."""
    return by_keys(_fill, alpha, v, weight, y, per_head, GPU_KEYS)


def _fill(alpha: Tensor, f: Tensor, y: Tensor, out: Tensor) -> None:
    """Fill out (B, T, m) for alpha (B, H, T, m), f (B, H, m, d) and y (B, T, d)."""
    (batch, heads, m, width), rows = f.shape, y.shape[1]
    tiles = launch(heads, rows)
    key_blocks, row_blocks = -(-m // tiles["BLOCK_J"]), -(-rows // tiles["BLOCK_I"])
    with on(f.device):
        _proximity_kernel[(key_blocks * row_blocks * batch,)](
            alpha, f, y, out, m, rows, heads, width, key_blocks, row_blocks,
            *alpha.stride(), *f.stride()[:3], *y.stride()[:2], *out.stride(),
            PRODUCTS=float32_precision(), **tiles,
        )  # fmt: skip

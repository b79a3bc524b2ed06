"""Squared norms |x[i] M|^2 of rows after the linear map of a stage, in one fused kernel.

M = (C diag(gamma_1)) (C diag(gamma_2)), with C the centering matrix (Modarressi et al., 2022, eq. 6 to 10,
applied to the residual). Each mean needs one pass over the row, and the squares one more. All passes but the
first read from cache. One launch replaces seven launches of torch.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.kernels._device import COUNTS, on, power_of_two
from pyglobenc.kernels._division import float32_reasons
from pyglobenc.kernels.head_gram import load_block


@triton.jit
def mapped_block(X, stride_xn, G1, G2, mean_1, mean_2, i, i_ok, e, e_ok, PASSED: tl.constexpr):
    """Load columns e of x and apply the first PASSED maps, (rows, columns); 0 outside."""
    x = load_block(X, stride_xn, i, i_ok, e, e_ok)
    if PASSED > 0:
        x = (x - mean_1[:, None]) * tl.load(G1 + e, mask=e_ok, other=0.0)[None, :]
    if PASSED > 1:
        x = (x - mean_2[:, None]) * tl.load(G2 + e, mask=e_ok, other=0.0)[None, :]
    return x


@triton.jit(do_not_specialize=COUNTS)
def _mapped_square_kernel(
    X,  # (B, n, d)
    G1,  # (d,)
    G2,  # (d,)
    OUT,  # (B, n)
    n, width, blocks, stride_xb, stride_xn,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    X += b * stride_xb
    mean_1 = tl.zeros((BLOCK_N,), tl.float32)
    mean_2 = tl.zeros((BLOCK_N,), tl.float32)
    if COUNT > 0:
        for start in range(0, width, BLOCK_D):
            e = start + tl.arange(0, BLOCK_D)
            mean_1 += tl.sum(mapped_block(X, stride_xn, G1, G2, mean_1, mean_2, i, i < n, e, e < width, 0), 1)
        mean_1 = mean_1 / width
    if COUNT > 1:
        for start in range(0, width, BLOCK_D):
            e = start + tl.arange(0, BLOCK_D)
            mean_2 += tl.sum(mapped_block(X, stride_xn, G1, G2, mean_1, mean_2, i, i < n, e, e < width, 1), 1)
        mean_2 = mean_2 / width
    square = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, width, BLOCK_D):
        e = start + tl.arange(0, BLOCK_D)
        x = mapped_block(X, stride_xn, G1, G2, mean_1, mean_2, i, i < n, e, e < width, COUNT)
        square += tl.sum(x * x, 1)
    tl.store(OUT + b * n + i, square, mask=i < n)


def launch(width: int) -> dict[str, int]:
    """Return tile sizes and warps: one warp takes a row, and each lane 32 of its entries at a time."""
    return dict(BLOCK_N=4, BLOCK_D=min(1024, power_of_two(width, 32)), num_warps=4)


def why_not(x: Tensor, gammas: Sequence[Tensor]) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.mapped_square` can't run here; empty if they can."""
    return float32_reasons({"x": x}, **{f"gammas[{index}]": gamma for index, gamma in enumerate(gammas)})


def run(x: Tensor, gammas: Sequence[Tensor]) -> Tensor:
    """See `pyglobenc.ops.mapped_square`: -> (B, n)."""
    batch, n, width = x.shape
    out = torch.empty(batch, n, device=x.device)
    if out.numel() == 0 or width == 0:
        return out.zero_()
    tiles = launch(width)
    blocks = -(-n // tiles["BLOCK_N"])
    x = x if x.stride(-1) == 1 else x.contiguous()
    given = [gamma.contiguous() for gamma in gammas] + [None, None]
    with on(x.device):
        _mapped_square_kernel[(blocks * batch,)](
            x, *given[:2], out, n, width, blocks, *x.stride()[:2], COUNT=len(gammas), **tiles
        )
    return out

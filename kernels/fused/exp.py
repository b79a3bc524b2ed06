"""Measures the rate of the hardware unit for exponentials, as the kernels over pairs use it."""

import torch
import triton
import triton.language as tl

from pyglobenc.kernels._device import on, processors

BLOCK, CHAIN = 2048, 1024
# Programs for each multiprocessor, several times as many as run at once.
PROGRAMS = 64


@triton.jit
def _exp_kernel(OUT, CHAIN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(CHAIN):
        x = tl.exp2(-x)
    tl.store(OUT + at, x)


def exp(device: torch.device) -> int:
    """Compute exponentials on a GPU, and return how many were computed."""
    programs = PROGRAMS * processors(device)
    out = torch.empty(programs * BLOCK, dtype=torch.float32, device=device)
    with on(device):
        _exp_kernel[(programs,)](out, CHAIN=CHAIN, BLOCK=BLOCK, num_warps=8)
    return out.numel() * CHAIN

"""Products of tokens with one direction and their lengths, in one pass of C++ (csrc/cpu/projection.cpp)."""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import INPUTS, kernels


def why_not(t: Tensor, u: Tensor) -> list[str]:
    """Return why the kernel can't run on tensors (B, n, d) or (B, H, n, dh) and u (d,); empty if it can."""
    # A subclass of Tensor may have no memory that a kernel can read.
    plain = type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.stride(-1) == 1
    return [] if plain and t.dtype in INPUTS and u.is_contiguous() else ["takes float tensors by rows"]


def run(t: Tensor, u: Tensor, length: bool) -> tuple[Tensor, Tensor | None]:
    """Return the products with u and, if wanted, the L2 norms of the tokens, (B, n) each, float32.

    Args:
        t: (B, n, d), or (B, H, n, dh) with d = H * dh, float32 or half precision.
        u: (d,) float32.
        length: whether the norms are wanted.
    """
    t = t.unsqueeze(2) if t.dim() == 3 else t.transpose(1, 2)
    out = t.new_empty(2 if length else 1, *t.shape[:2], dtype=torch.float32)
    kernels.project(t, u, out, torch.get_num_threads())
    return out[0], out[1] if length else None

"""Launcher of csrc/cuda/add_relevance.cu."""

import torch
from torch import Tensor

from pyglobenc.cuda import _extension
from pyglobenc.cuda._relevance import float32_reasons, new_like


def not_supported(
    r: Tensor, a: Tensor, b: Tensor, stabilizer: float = 0.0, rescale: bool = True, offsets: Tensor | None = None
) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    return float32_reasons(r=r, a=a, b=b) + (["takes no packed sequences"] if offsets is not None else [])


def add_relevance(
    r: Tensor, a: Tensor, b: Tensor, stabilizer: float = 0.0, rescale: bool = True, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.add_relevance`: -> R_a, R_b (B, n, d)."""
    r_a, r_b = new_like(r), new_like(r)
    if size := r.numel():
        batch = r.shape[0]
        blocks = _extension.kernels.add_relevance_blocks(size // batch)
        sums = torch.empty(batch, blocks, 3, dtype=torch.float64, device=r.device)
        with _extension.launching(r.device) as stream:
            tensors = (r.contiguous(), a.contiguous(), b.contiguous(), sums, r_a, r_b)
            _extension.kernels.add_relevance(tensors, stabilizer, rescale, stream)
    return r_a, r_b

"""Launcher of csrc/cuda/add_relevance.cu."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._relevance import float32_reasons, new_like
from pyglobenc.backends.shared.packing import on_device


def why_not(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    stabilizer: float = 0.0,
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.add_relevance` can't run here; empty if they can."""
    return float32_reasons(r=r, a=a, b=b)


def run(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    stabilizer: float = 0.0,
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.add_relevance`: -> R_a, R_b (B, n, d)."""
    r_a, r_b = new_like(r), new_like(r)
    if size := r.numel():
        # Without sums, examples need no separate treatment.
        if cu_seqlens is None or not rescale:
            ends, examples, width, longest = None, r.shape[0], size // r.shape[0], 1
        else:
            examples, width = len(cu_seqlens) - 1, r.shape[2]
            ends, longest = on_device(cu_seqlens, r.device)
        sums = torch.empty(
            _extension.kernels.add_relevance_parts(size, examples), 3, dtype=torch.float64, device=r.device
        )
        with _extension.launching(r.device) as stream:
            tensors = (r.contiguous(), a.contiguous(), b.contiguous(), ends, sums, r_a, r_b)
            _extension.kernels.add_relevance(tensors, examples, width, longest, stabilizer, rescale, stream)
    return r_a, r_b

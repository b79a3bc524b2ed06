"""Relevance through a residual sum a + b, two passes over memory: csrc/cpu/add_relevance.cpp."""

import torch
from torch import Tensor

from pyglobenc.cpu._extension import kernels, single


def not_supported(r: Tensor, a: Tensor, b: Tensor, stabilizer: float = 0.0, rescale: bool = True) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.add_relevance` can't run here."""
    return single(r, a, b)


def add_relevance(r: Tensor, a: Tensor, b: Tensor, stabilizer: float = 0.0, rescale: bool = True) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.add_relevance`: -> R_a, R_b (B, n, d)."""
    r, a, b = r.contiguous(), a.contiguous(), b.contiguous()
    out = torch.empty_like(r), torch.empty_like(r)
    kernels.add_relevance(r, a, b, *out, stabilizer, rescale, torch.get_num_threads())
    return out

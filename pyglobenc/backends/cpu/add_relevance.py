"""Relevance through a residual sum a + b: csrc/cpu/add_relevance.cpp, two passes over memory."""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, single
from pyglobenc.backends.shared.packing import by_runs


def why_not(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    stabilizer: float = 0.0,
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.add_relevance` can't run here; empty if they can."""
    return single(r, a, b)


def run(
    r: Tensor,
    a: Tensor,
    b: Tensor,
    stabilizer: float = 0.0,
    rescale: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.add_relevance`: -> R_a, R_b (B, n, d)."""
    if cu_seqlens is not None and rescale:
        return tuple(by_runs(lambda *each: run(*each, stabilizer), (r, a, b), (1, 1, 1), (1, 1), cu_seqlens))
    r, a, b = r.contiguous(), a.contiguous(), b.contiguous()
    out = torch.empty_like(r), torch.empty_like(r)
    kernels.add_relevance(r, a, b, *out, stabilizer, rescale, torch.get_num_threads())
    return out

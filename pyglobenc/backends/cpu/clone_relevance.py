"""Relevance of a tensor that several branches read: csrc/cpu/clone_relevance.cpp, one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, single


def why_not(parts: Sequence[Tensor], x: Tensor) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.clone_relevance` can't run here; empty if they can."""
    return single(x, *parts)


def run(parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """See `pyglobenc.ops.clone_relevance`: -> (B, n, d)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.clone_relevance([part.contiguous() for part in parts], x, out, x.numel(), torch.get_num_threads())
    return out

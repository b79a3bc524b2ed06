"""Relevance of a tensor that several branches read, one pass over memory: csrc/cpu/clone_relevance.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, single


def not_supported(parts: Sequence[Tensor], x: Tensor) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.clone_relevance` can't run here."""
    return single(x, *parts)


def clone_relevance(parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """See `pyglobenc.ops.clone_relevance`: -> (B, n, d)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.clone_relevance([part.contiguous() for part in parts], x, out, x.numel(), torch.get_num_threads())
    return out

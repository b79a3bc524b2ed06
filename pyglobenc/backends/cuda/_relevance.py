"""What the launchers of the relevance rules share."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.shared import dtypes


def float32_reasons(widened: dict[str, Tensor | None] | None = None, **tensors: Tensor | None) -> list[str]:
    """Why a float32 kernel can't run on these tensors; those it widens may be in half precision."""
    widened = widened or {}
    return _extension.device_reasons({**widened, **tensors}) + dtypes.float32_reasons(widened, tensors)


def new_like(t: Tensor) -> Tensor:
    """Uninitialised contiguous tensor of t's shape."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def relevance_reasons(q: Tensor, **others: Tensor | None) -> list[str]:
    """Why a relevance kernel over pairs can't run on these tensors."""
    reasons = float32_reasons(q=q, **others)
    if not reasons:
        with _extension.launching(q.device):
            limit, needed = _extension.kernels.shared_limit(), _extension.kernels.relevance_shared(q.shape[3])
        if needed > limit:
            reasons.append(f"heads of {q.shape[3]} take {needed} bytes of shared memory, a block here has {limit}")
    return reasons

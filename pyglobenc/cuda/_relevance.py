"""What the launchers of the relevance rules share."""

import torch
from torch import Tensor

from pyglobenc.cuda import _extension


def float32_reasons(**tensors: Tensor | None) -> list[str]:
    """Why a float32 kernel can't run on these tensors."""
    reasons = _extension.device_reasons(tensors)
    wrong = {name: t.dtype for name, t in tensors.items() if t is not None and t.is_floating_point() and t.dtype != torch.float32}
    if wrong:
        reasons.append("computes in float32, got " + ", ".join(f"{name} {dtype}" for name, dtype in wrong.items()))
    return reasons


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

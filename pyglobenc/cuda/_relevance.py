"""What the launchers of the relevance rules share."""

import torch
from torch import Tensor

from pyglobenc.cuda._extension import device_reasons


def float32_reasons(**tensors: Tensor | None) -> list[str]:
    """Why a float32 kernel can't run on these tensors."""
    reasons = device_reasons(tensors)
    wrong = {name: t.dtype for name, t in tensors.items() if t is not None and t.is_floating_point() and t.dtype != torch.float32}
    if wrong:
        reasons.append("computes in float32, got " + ", ".join(f"{name} {dtype}" for name, dtype in wrong.items()))
    return reasons


def new_like(t: Tensor) -> Tensor:
    """Uninitialised contiguous tensor of t's shape."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)

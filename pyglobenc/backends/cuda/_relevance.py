"""Code that the launchers of the relevance rules share."""

from functools import partial

import torch
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared import launch

# Returns why a float32 kernel can't run on tensors; see `pyglobenc.backends.shared.launch.float32_reasons`.
float32_reasons = partial(launch.float32_reasons, _extension.device_reasons)


def new_like(t: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor of t's shape."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def relevance_reasons(inputs: RelevanceInputs, other: Tensor | None) -> list[str]:
    """Return why a relevance kernel can't run on these inputs; other: a further tensor of the op, or None."""
    reasons = float32_reasons(**inputs.tensors(), other=other)
    reasons += inputs.reference_alone()
    if not reasons:
        head_dim = inputs.q.shape[3]
        with _extension.launching(inputs.device):
            limit, needed = _extension.kernels.shared_limit(), _extension.kernels.relevance_shared(head_dim)
        if needed > limit:
            reasons.append(
                f"heads of {head_dim} take {needed} bytes of shared memory, a block here has {limit}"
            )
    return reasons

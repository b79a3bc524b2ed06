"""L1 proximity of each key's vectors to the values of rows: csrc/cpu/proximity.cpp.

torch computes the transformed vectors of a block of keys, and the kernel everything else.
"""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, limits
from pyglobenc.backends.shared.proximity_tiles import by_keys


def why_not(alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, per_head: bool) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.proximity` can't run here; empty if they can."""
    return limits(weight, v)


def run(alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, per_head: bool) -> Tensor:
    """See `pyglobenc.ops.proximity`: -> (B, T, n), or (B, H, T, n) with per_head."""

    def fill(*tensors: Tensor) -> None:
        kernels.proximity(*tensors, torch.get_num_threads())

    return by_keys(fill, alpha, v, weight, y, per_head)

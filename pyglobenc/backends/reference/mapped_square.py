"""Squared norms of rows that a stage's linear map was applied to: |x[i] M|^2, M of `stage_map`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.reference.stage_map import stage_map


def result_dtype(x: Tensor, gammas: Sequence[Tensor]) -> torch.dtype:
    """Of arithmetic and result for x (B, n, d): that of the gammas (d,), without any that of x, or float32 for half precision."""
    return gammas[0].dtype if gammas else torch.promote_types(x.dtype, torch.float32)


def mapped_square(x: Tensor, gammas: Sequence[Tensor]) -> Tensor:
    """See `pyglobenc.ops.mapped_square`: -> (B, n)."""
    return stage_map(x.to(result_dtype(x, gammas)), gammas).square().sum(-1)

"""Squared norms of rows after the linear map of a stage: |x[i] M|^2, with M of `stage_map`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.reference.stage_map import stage_map


def result_dtype(x: Tensor, gammas: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of the result for x (B, n, d).

    It is the dtype of the gammas (d,). Without gammas it is the dtype of x, or float32 for half precision.
    """
    return gammas[0].dtype if gammas else torch.promote_types(x.dtype, torch.float32)


def run(x: Tensor, gammas: Sequence[Tensor]) -> Tensor:
    """See `pyglobenc.ops.mapped_square`: -> (B, n)."""
    return stage_map(x.to(result_dtype(x, gammas)), gammas).square().sum(-1)

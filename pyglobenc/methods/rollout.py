"""Rollout: the layers' matrices multiplied from the top down for chosen rows, or in full (Abnar and Zuidema, 2020)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.methods.layer_matrix import LayerMatrix


def roll_out_rows(matrices: Sequence[LayerMatrix], targets: Tensor, layers: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of N_L ... N_2 N_1, without a matrix: O(T*n) memory beside the layers' own.

    Args:
        matrices: one a layer, first layer first.
        targets: rows wanted, (B, T) int64.
        layers: also the rollout up to every layer.

    Returns:
        scores (B, L, T, n), each row's largest entry 1, and log_scale (B, L, T); L is 1, the whole rollout, without layers.
    """
    count = targets.shape[1]
    r = log_scale = None
    for matrix in reversed(matrices):
        if r is not None:
            r, log_scale = matrix.step(r, log_scale)
        if r is None or layers:
            rows = matrix.rows(targets)
            top = rows.amax(-1).clamp_min(torch.finfo(rows.dtype).tiny)
            rows, scale = rows / top[..., None], top.log()
            r = rows if r is None else torch.cat([rows, r], dim=1)
            log_scale = scale if log_scale is None else torch.cat([scale, log_scale], dim=1)
    return r.unflatten(1, (-1, count)), log_scale.unflatten(1, (-1, count))


def roll_out(matrices: Sequence[Tensor]) -> Tensor:
    """N_L ... N_2 N_1 of matrices (B, n, n), unnormalised, in float64 so that deep models don't overflow: (B, n, n)."""
    out = None
    for matrix in matrices:
        out = matrix.double() if out is None else matrix.double() @ out
    return out

"""Rollout: the layers' matrices multiplied from the top down for chosen rows, or in full (Abnar and Zuidema,
2020).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.rows import rescale_rows
from pyglobenc.methods.inputs import require_finite
from pyglobenc.methods.rollout.layer_matrix import LayerMatrix


def roll_out_rows(
    matrices: Iterable[LayerMatrix], targets: Tensor, layers: bool = False, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of N_L ... N_2 N_1, without a matrix: O(T*n) memory beside the layers' own.

    Args:
        matrices: one a layer, last layer first; taken one at a time, so that a generator holds one layer's at
            once.
        targets: rows wanted, (B, T) int64; or what rows are multiplied with, (B, T, n) floating point.
        layers: also the rollout up to every layer.
        cu_seqlens: (S + 1,) of the sequences that the matrices pack; targets are then (S, T), positions among
            all N tokens, or (1, T, N).

    Returns:
        scores (B, L, T, n), each row's largest entry 1, and log_scale (B, L, T); L is 1, the whole rollout,
        without layers. Of packed sequences scores (1, L, T, N), each sequence's at its own tokens, and
        log_scale (S, L, T).
    """
    count = targets.shape[1]
    r = log_scale = None
    for matrix in matrices:
        if r is not None:
            r, log_scale = matrix.step(r, log_scale)
        if r is None or layers:
            rows, scale = _first_rows(matrix, targets, cu_seqlens)
            r = rows if r is None else torch.cat([rows, r], dim=1)
            log_scale = scale if log_scale is None else torch.cat([scale, log_scale], dim=1)
    return r.unflatten(1, (-1, count)), log_scale.unflatten(1, (-1, count))


def _first_rows(matrix: LayerMatrix, targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of one matrix, scaled to maximum 1, and their log_scale."""
    if targets.is_floating_point():
        return matrix.step(
            targets,
            targets.new_zeros(len(targets) if cu_seqlens is None else len(cu_seqlens) - 1, targets.shape[1]),
        )
    if cu_seqlens is None:
        rows = matrix.rows(targets)
        return rescale_rows(rows, torch.zeros_like(rows[..., 0]))
    # a row of every sequence is one product with unit vectors
    unit = targets.new_zeros(1, targets.shape[1], int(cu_seqlens[-1])).scatter_(2, targets.T[None], 1)
    return matrix.step(unit, torch.zeros_like(targets))


def stack_layers(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors (B, ...) of every layer as (B, L, ...); the layers of a model may lie on several devices."""
    return torch.stack([t.to(tensors[0].device) for t in tensors], dim=1)


def roll_out(matrices: Sequence[Tensor]) -> Tensor:
    """N_L ... N_2 N_1 of matrices (B, n, n), unnormalised, in float64 so that deep models don't overflow: (B,
    n, n).
    """
    out = None
    for matrix in matrices:
        out = matrix.double() if out is None else matrix.double() @ out.to(matrix.device)
    return out


@dataclass
class RolloutResult:
    """Rows of a rollout.

    Attributes:
        scores: (B, T, n), row `target` of the rollout, largest entry of each row 1; padding 0.
        log_scale: (B, T); the unnormalised value is scores * exp(log_scale).
        layer_scores: (B, L, T, n), the rollout up to each layer, scaled the same way; None unless asked for.
        layer_log_scale: (B, L, T), or None.
        maps: the maps asked for, by name.
        output: what the model returned.
        error: (B,), how far rounding moves the scores, relative L2 distance, NaN where it is unknown; None
            unless it was measured.
        targets: (B, T) int64, positions of the targets; None for a mean over tokens, T = 1.
    """

    scores: Tensor
    log_scale: Tensor
    layer_scores: Tensor | None = None
    layer_log_scale: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None
    targets: Tensor | None = None
    error: Tensor | None = None


def rollout_result(
    who: str, model: nn.Module, scores: Tensor, log_scale: Tensor, layers: bool
) -> RolloutResult:
    """Result from what `roll_out_rows` returned for (B, L, T, n); ValueError as `require_finite` when it
    isn't finite.
    """
    require_finite(who, model, (scores, log_scale))
    if not layers:
        return RolloutResult(scores[:, -1], log_scale[:, -1])
    return RolloutResult(scores[:, -1], log_scale[:, -1], scores, log_scale)

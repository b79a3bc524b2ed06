"""Rollout: the layers' matrices multiplied from the top down (Abnar and Zuidema, 2020)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.rows import rescale_rows
from pyglobenc.hf import LayerTrace
from pyglobenc.methods.inputs import require_finite
from pyglobenc.methods.precision.reliability import warn_of_precision
from pyglobenc.methods.rollout.layer_matrix import LayerMatrix


def roll_out_rows(
    matrices: Iterable[LayerMatrix], targets: Tensor, layers: bool = False, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return rows of the product N_L ... N_2 N_1 without building a matrix.

    The rows take O(T*n) memory, in addition to what the layers take themselves.

    Args:
        matrices: one matrix for each layer, last layer first. They are taken one at a time, so a generator
            needs to hold only one layer's tensors.
        targets: positions of the rows that are wanted, (B, T) int64. A floating-point tensor (B, T, n) is
            multiplied with the product instead.
        layers: whether to also return the rollout up to every layer.
        cu_seqlens: boundaries (S + 1,) of the sequences that the matrices pack, or None. With packed
            sequences targets are (S, T) positions among all N tokens, or (1, T, N).

    Returns:
        scores (B, L, T, n), scaled so that the largest entry of each row is 1, and log_scale (B, L, T). L is
        1 if `layers` is False. Packed sequences give scores (1, L, T, N), where each sequence's scores are
        at its own tokens, and log_scale (S, L, T).

    Source: Abnar and Zuidema, 2020.
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
        # A generator would otherwise make the next layer's tensors beside those of this one.
        del matrix
    return r.unflatten(1, (-1, count)), log_scale.unflatten(1, (-1, count))


def _first_rows(matrix: LayerMatrix, targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return rows of one matrix, scaled to maximum 1, and their log_scale."""
    if targets.is_floating_point():
        return matrix.step(
            targets,
            targets.new_zeros(len(targets) if cu_seqlens is None else len(cu_seqlens) - 1, targets.shape[1]),
        )
    if cu_seqlens is None:
        rows = matrix.rows(targets)
        return rescale_rows(rows, torch.zeros_like(rows[..., 0]))
    # One product with unit vectors gives a row of every sequence.
    unit = targets.new_zeros(1, targets.shape[1], int(cu_seqlens[-1])).scatter_(2, targets.T[None], 1)
    return matrix.step(unit, torch.zeros_like(targets))


def stack_layers(tensors: Sequence[Tensor]) -> Tensor:
    """Stack one tensor for each of L layers along a new second axis, on the device of the first one.

    Args:
        tensors: L tensors of equal shape, such as (B, n, n).

    Returns:
        A tensor such as (B, L, n, n).
    """
    return torch.stack([t.to(tensors[0].device) for t in tensors], dim=1)


def roll_out(matrices: Sequence[Tensor]) -> Tensor:
    """Return the full product N_L ... N_2 N_1, (B, n, n), of matrices (B, n, n), not normalised.

    The product is float64, because it would overflow float32 in deep models.
    """
    out = None
    for matrix in matrices:
        out = matrix.double() if out is None else matrix.double() @ out.to(matrix.device)
    return out


@dataclass
class RolloutResult:
    """Rows of a rollout.

    Attributes:
        scores: (B, T, n), one row of the rollout for each target, scaled so that its largest entry is 1.
            Padding is 0.
        log_scale: (B, T). The value before scaling is scores * exp(log_scale).
        layer_scores: (B, L, T, n), the rollout up to each layer, scaled the same way. None unless it was
            asked for.
        layer_log_scale: (B, L, T), or None.
        maps: the maps that were asked for, by name.
        output: the output of the model.
        targets: (B, T) int64, positions of the targets. None for a mean over tokens, T = 1.
        error: (B,), relative L2 distance by which rounding moves the scores, NaN where it is unknown. It is
            NaN for every example if the forward pass ran in half precision and the error was not measured.
            None if the forward pass ran in full precision and the error was not measured.
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
    who: str,
    model: nn.Module,
    scores: Tensor,
    log_scale: Tensor,
    layers: bool,
    unmeasured: Iterable[LayerTrace] = (),
) -> RolloutResult:
    """Build a result from scores (B, L, T, n) and log_scale (B, L, T), as `roll_out_rows` returns them.

    Args:
        who: name of the method for errors.
        model: the model, whose parameters are searched for NaN if the scores aren't finite.
        scores, log_scale: as above.
        layers: whether the result keeps the rows of every layer. Otherwise it keeps those of the last.
        unmeasured: the captured layers, if the error isn't measured. In half precision it is then unknown,
            and a PrecisionWarning says so.

    Raises:
        ValueError: a score isn't finite.
    """
    require_finite(who, model, (scores, log_scale))
    error = unknown_error(who, unmeasured, len(log_scale), scores.device)
    of_layers = (scores, log_scale) if layers else (None, None)
    return RolloutResult(scores[:, -1], log_scale[:, -1], *of_layers, error=error)


def unknown_error(who: str, captured: Iterable[LayerTrace], size: int, device: torch.device) -> Tensor | None:
    """Return the error of B = size examples that isn't measured: NaN (B,) in half precision, otherwise None.

    A PrecisionWarning in the name of `who` says that it is unknown. captured are the model's layers.
    """
    if not any(layer.in_half for layer in captured):
        return None
    error = torch.full((size,), float("nan"), dtype=torch.float64, device=device)
    measure = "ask GlobEnc for reliability='measured', or run the model in float32"
    warn_of_precision(who, error, None, "the model ran in half precision", measure)
    return error

"""Which tokens are explained."""

from collections.abc import Sequence

import torch
from torch import Tensor


def target_rows(who: str, targets: Sequence[int] | Tensor, batch: int, n: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Targets as (B, T) int64, checked.

    Args:
        who: method named in errors.
        targets: T positions for every example, or (B, T), each in [0, n) and not padding.
        batch, n: shape of the input.
        key_mask: (B, n) bool, True for real tokens, or None.
        device: where the result lives.

    Raises:
        TypeError, ValueError: not integers, empty, out of range, padding, or of another batch.
    """
    rows = torch.as_tensor(targets, device=device)
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"{who}: targets must be integers, got {rows.dtype}")
    if rows.dim() == 1:
        rows = rows.expand(batch, -1)
    if rows.dim() != 2 or rows.shape[0] != batch or rows.shape[1] == 0:
        raise ValueError(f"{who}: targets must be T positions or (B, T) with B={batch} and T at least 1, got {tuple(rows.shape)}")
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(f"{who}: targets must lie in [0, {n}), got {int(rows.min())} to {int(rows.max())}")
    rows = rows.long()
    if key_mask is not None and not key_mask.gather(1, rows).all():
        raise ValueError(f"{who}: a target is a padding token")
    return rows

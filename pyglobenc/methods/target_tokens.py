"""Decides which tokens a rollout explains: those that the caller names, what the head reads, or [CLS]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.shared.packing import real_tokens
from pyglobenc.common.deferred import check_range, require
from pyglobenc.common.integers import integers
from pyglobenc.hf import LayerTrace


def default_rows(layer: LayerTrace) -> Tensor:
    """Return the documented default target, for models whose head doesn't determine one.

    This is the first real token ([CLS]), or the last real token of a causal model.

    Args:
        layer: any captured layer, for B, n, the padding and the window.

    Returns:
        Positions (B, 1) int64. With packed sequences (S, 1), positions among all tokens.
    """
    causal = layer.window[1] == 0
    if layer.cu_seqlens is not None:
        ends = layer.cu_seqlens[:, None].long()
        return ends[1:] - 1 if causal else ends[:-1]
    batch, _, n, _ = layer.q.shape
    i = torch.arange(n, device=layer.q.device).expand(batch, n)
    real = torch.ones_like(i, dtype=torch.bool) if layer.key_mask is None else layer.key_mask
    if causal:
        return i.masked_fill(~real, -1).amax(1, keepdim=True)
    return i.masked_fill(~real, n).amin(1, keepdim=True)


def unnamed_rows(who: str, targets: str | None, layer: LayerTrace, read: Tensor | None) -> Tensor:
    """Return the rows of a rollout for targets that aren't given as positions.

    Args:
        who: name of the method for errors.
        targets: "mean", or None for what the head reads.
        layer: any captured layer, for B, n, the padding and packed sequences.
        read: what the head reads, (B, 1) or (B, 1, n) as `tokens_read` says, padded for packed sequences.
            None means `default_rows`.

    Returns:
        Positions (B, 1) int64, or the share of each token in a mean, (B, 1, n). With packed sequences
        (S, 1) positions among all tokens, or shares (1, 1, N).

    Raises:
        ValueError: targets is another word than "mean".
    """
    if targets is not None and targets != "mean":
        raise ValueError(f"{who}: targets must be token positions or 'mean', got {targets!r}")
    cu_seqlens, device = layer.cu_seqlens, layer.q.device
    real = layer.key_mask if cu_seqlens is None else real_tokens(cu_seqlens).to(device)
    if targets == "mean":
        batch, _, n, _ = layer.q.shape
        if real is None:
            return torch.full((batch, 1, n), 1 / n, dtype=torch.float64, device=device)
        read = (real / real.sum(1, keepdim=True, dtype=torch.float64))[:, None]
    if read is None:
        return default_rows(layer)
    if cu_seqlens is None:
        return read
    return read.cpu() + cu_seqlens[:-1, None].long() if read.dim() == 2 else read[:, 0][real][None, None]


def target_rows(
    who: str, targets: str | Sequence[int] | Tensor | None, layer: LayerTrace, read: Tensor | None = None
) -> Tensor:
    """Check targets and return them as (B, T) int64, or for a mean the share of each token, (B, 1, n).

    Args:
        who: name of the method for errors.
        targets: T positions for every example, or (B, T), each in [0, n) and not padding. "mean" or None as
            for `unnamed_rows`.
        layer: any captured layer, for B, n and the padding.
        read: what the head reads, as for `unnamed_rows`.

    Raises:
        TypeError, ValueError: targets aren't integers, are empty, out of range or padding, or have another
            batch size.
    """
    if targets is None or isinstance(targets, str):
        return unnamed_rows(who, targets, layer, read)
    batch, _, n, _ = layer.q.shape
    rows = target_positions(who, targets, batch, layer.q.device)
    check_range(who, "targets", rows, n)
    if layer.key_mask is not None:
        require(
            layer.key_mask.gather(1, rows).all(), lambda: ValueError(f"{who}: a target is a padding token")
        )
    return rows


def target_positions(
    who: str, targets: Sequence[int] | Tensor, batch: int, device: torch.device | str | None = None
) -> Tensor:
    """Return targets as (B, T) int64.

    Args:
        who: name of the method for errors.
        targets: T positions for every example, or (B, T).
        batch: B.
        device: the device of the result. None means that of a tensor, and the default device for others.

    Raises:
        TypeError, ValueError: targets aren't integers, or have another shape.
    """
    targets = integers(who, "targets", targets, device)
    rows = targets.expand(batch, -1) if targets.dim() == 1 else targets
    if rows.dim() != 2 or rows.shape[0] != batch or rows.shape[1] == 0:
        raise ValueError(
            f"{who}: targets must be T positions or (B, T) with B={batch} and T at least 1, got "
            f"{tuple(rows.shape)}"
        )
    return rows.long()

"""Sequences packed into one: N tokens in a batch of 1, sequence s from offsets[s] to offsets[s + 1]; offsets (S + 1,) int32, on the CPU."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def slices(offsets: Tensor) -> list[slice]:
    """Tokens of every sequence."""
    ends = offsets.tolist()
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


def on_device(offsets: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Offsets where a kernel reads them, and the tokens of the longest sequence, without a wait for the device."""
    return offsets.contiguous().to(device, non_blocking=True), int(offsets.diff().max())


def sequence_of(offsets: Tensor, device: torch.device) -> Tensor:
    """Sequence of every token, (N,) int64."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff()).to(device, non_blocking=True)


def position_of(offsets: Tensor, device: torch.device) -> Tensor:
    """Position of every token in its sequence, (N,) int64."""
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff())
    return (torch.arange(len(starts), device=offsets.device) - starts).to(device, non_blocking=True)


def real_tokens(offsets: Tensor) -> Tensor:
    """Which tokens of the sequences in a padded batch are real, (S, n) bool, n those of the longest."""
    lengths = offsets.diff()
    return torch.arange(int(lengths.max()), device=offsets.device) < lengths[:, None]


def padded(t: Tensor, offsets: Tensor, fill: float = 0) -> Tensor:
    """Packed t (1, N, ...) as a padded batch, (S, n, ...)."""
    real = real_tokens(offsets).to(t.device, non_blocking=True)
    return t.new_full((*real.shape, *t.shape[2:]), fill).index_put(tuple(real.nonzero().T), t[0])


def sequence_sums(t: Tensor, offsets: Tensor) -> Tensor:
    """Sum of t (1, N) over each sequence: (S,)."""
    return torch.segment_reduce(t[0], "sum", offsets=offsets.to(t.device, non_blocking=True))


def per_token(t: Tensor, offsets: Tensor) -> Tensor:
    """What every sequence has, t (S, T), at each of its tokens: (1, T, N)."""
    return t[sequence_of(offsets, t.device)].T[None]


def per_sequence(r: Tensor, offsets: Tensor) -> Tensor:
    """Largest entry of rows r (1, T, N), none negative, over each sequence: (S, T)."""
    rows = r[0].T
    index = sequence_of(offsets, r.device)[:, None].expand_as(rows)
    return rows.new_zeros(len(offsets) - 1, rows.shape[1]).scatter_reduce(0, index, rows, "amax")


def by_runs(
    function: Callable[..., Sequence[Any]],
    tensors: Sequence[Tensor | None],
    axes: Sequence[int],
    out_axes: Sequence[int],
    offsets: Tensor,
) -> list[Tensor | None]:
    """Call a function on each run of sequences of one length side by side, as a batch of them, and pack what it returns.

    Args:
        function: of tensors (S, ..., n, ...), views; returns some, each with S first and n along its axis of tokens, or None.
        tensors: (1, ..., N, ...), or None.
        axes, out_axes: of tokens, of tensors and of what the function returns.
        offsets: of the packed sequences.
    """
    outs = []
    for _, run in groupby(slices(offsets), lambda tokens: tokens.stop - tokens.start):
        run = list(run)
        tokens = slice(run[0].start, run[-1].stop)
        outs.append(function(*(_unpacked(t, axis, len(run)) for t, axis in zip(take(tensors, axes, tokens), axes, strict=True))))
    columns = zip(zip(*outs, strict=True), out_axes, strict=True)
    return [None if parts[0] is None else torch.cat([_packed(part, axis) for part in parts], axis) for parts, axis in columns]


def _unpacked(t: Tensor | None, axis: int, count: int) -> Tensor | None:
    """(1, ..., N, ...) of `count` sequences of one length as a batch (count, ..., n, ...)."""
    return None if t is None else t[0].unflatten(axis - 1, (count, -1)).movedim(axis - 1, 0)


def _packed(t: Tensor, axis: int) -> Tensor:
    """The reverse."""
    return t.movedim(0, axis - 1).flatten(axis - 1, axis)[None]


def take(tensors: Sequence[Tensor | None], axes: Sequence[int], tokens: slice) -> list[Tensor | None]:
    """Tokens of one sequence of every tensor, along its axis of tokens."""
    narrowed = zip(tensors, axes, strict=True)
    return [t if t is None else t.narrow(axis, tokens.start, tokens.stop - tokens.start) for t, axis in narrowed]

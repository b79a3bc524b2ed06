"""Sequences packed into one: N tokens in a batch of 1, sequence s from offsets[s] to offsets[s + 1]; offsets (S + 1,) int32, on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor


def slices(offsets: Tensor) -> list[slice]:
    """Tokens of every sequence."""
    ends = offsets.tolist()
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


def sequence_of(offsets: Tensor, device: torch.device) -> Tensor:
    """Sequence of every token, (N,) int64."""
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff()).to(device, non_blocking=True)


def per_token(t: Tensor, offsets: Tensor) -> Tensor:
    """What every sequence has, t (S, T), at each of its tokens: (1, T, N)."""
    return t[sequence_of(offsets, t.device)].T[None]


def per_sequence(r: Tensor, offsets: Tensor) -> Tensor:
    """Largest entry of rows r (1, T, N), none negative, over each sequence: (S, T)."""
    rows = r[0].T
    index = sequence_of(offsets, r.device)[:, None].expand_as(rows)
    return rows.new_zeros(len(offsets) - 1, rows.shape[1]).scatter_reduce(0, index, rows, "amax")


def take(tensors: Sequence[Tensor | None], axes: Sequence[int], tokens: slice) -> list[Tensor | None]:
    """Tokens of one sequence of every tensor, along its axis of tokens."""
    narrowed = zip(tensors, axes, strict=True)
    return [t if t is None else t.narrow(axis, tokens.start, tokens.stop - tokens.start) for t, axis in narrowed]

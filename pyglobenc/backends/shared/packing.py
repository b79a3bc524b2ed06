"""Sequences of different lengths packed end to end into a batch of 1, without padding.

The N tokens of all sequences lie side by side. cu_seqlens, (S + 1,) int32 on the CPU, says where each begins:
sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def slices(cu_seqlens: Tensor) -> list[slice]:
    """Return the range of tokens of each sequence, for cu_seqlens (S + 1,)."""
    ends = cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]


def on_device(cu_seqlens: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Copy cu_seqlens (S + 1,) to a device without waiting, and return the longest sequence's length too."""
    return cu_seqlens.contiguous().to(device, non_blocking=True), int(cu_seqlens.diff().max())


def sequence_of(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Return the number of the sequence that each token belongs to, (N,) int64."""
    return torch.repeat_interleave(
        torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device), cu_seqlens.diff()
    ).to(device, non_blocking=True)


def position_of(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Return the position of each token in its own sequence, (N,) int64."""
    starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    return (torch.arange(len(starts), device=cu_seqlens.device) - starts).to(device, non_blocking=True)


def real_tokens(cu_seqlens: Tensor) -> Tensor:
    """Return (S, n) bool, True for the real tokens of a padded batch; n is the longest sequence's length."""
    lengths = cu_seqlens.diff()
    return torch.arange(int(lengths.max()), device=cu_seqlens.device) < lengths[:, None]


def padded(t: Tensor, cu_seqlens: Tensor, fill: float = 0) -> Tensor:
    """Return the packed t (1, N, ...) as a padded batch (S, n, ...), with `fill` as padding."""
    real = real_tokens(cu_seqlens).to(t.device, non_blocking=True)
    return t.new_full((*real.shape, *t.shape[2:]), fill).index_put(tuple(real.nonzero().T), t[0])


def sequence_sums(t: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the sum of t (1, N) over each sequence, (S,)."""
    return torch.segment_reduce(t[0], "sum", offsets=cu_seqlens.to(t.device, non_blocking=True))


def per_token(t: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Repeat the values t (S, T) of each sequence at all its tokens: (1, T, N)."""
    return t[sequence_of(cu_seqlens, t.device)].T[None]


def per_sequence(r: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the largest entry of the non-negative rows r (1, T, N) within each sequence, (S, T)."""
    rows = r[0].T
    index = sequence_of(cu_seqlens, r.device)[:, None].expand_as(rows)
    return rows.new_zeros(len(cu_seqlens) - 1, rows.shape[1]).scatter_reduce(0, index, rows, "amax")


def by_runs(
    function: Callable[..., Sequence[Any]],
    tensors: Sequence[Tensor | None],
    axes: Sequence[int],
    out_axes: Sequence[int],
    cu_seqlens: Tensor,
) -> list[Tensor | None]:
    """Call a function on sequences of equal length that lie side by side, as one batch, and pack the results.

    Args:
        function: takes views (S, ..., n, ...) of the tensors. It returns tensors with S as the first axis and
            n along the axis of tokens; an entry may be None.
        tensors: (1, ..., N, ...), or None.
        axes, out_axes: axis of the tokens in each of the tensors, and in each result.
        cu_seqlens: as in this module's docstring.
    """
    outs = []
    for _, run in groupby(slices(cu_seqlens), lambda tokens: tokens.stop - tokens.start):
        run = list(run)
        tokens = slice(run[0].start, run[-1].stop)
        outs.append(
            function(
                *(
                    _unpacked(t, axis, len(run))
                    for t, axis in zip(take(tensors, axes, tokens), axes, strict=True)
                )
            )
        )
    columns = zip(zip(*outs, strict=True), out_axes, strict=True)
    return [
        None if parts[0] is None else torch.cat([_packed(part, axis) for part in parts], axis)
        for parts, axis in columns
    ]


def each_run(
    function: Callable[..., Sequence[Any]],
    inputs: Any,
    others: Sequence[Tensor | None],
    other_axes: Sequence[int],
    out_axes: Sequence[int],
) -> list[Tensor | None]:
    """Call `by_runs` with function(inputs, *others), where inputs no longer have cu_seqlens.

    inputs are those of `pyglobenc.backends.inputs`. others are (1, ..., N, ...) or None, with the tokens
    along other_axes.
    """
    given = inputs.of_tokens()
    axes = [inputs.AXES[name] for name in given]

    def one(*each: Tensor | None) -> Sequence[Any]:
        own = dict(zip(given, each[: len(given)], strict=True))
        return function(inputs.replace(**own, cu_seqlens=None), *each[len(given) :])

    return by_runs(one, (*given.values(), *others), (*axes, *other_axes), out_axes, inputs.cu_seqlens)


def _unpacked(t: Tensor | None, axis: int, count: int) -> Tensor | None:
    """View (1, ..., N, ...), `count` sequences of equal length, as a batch (count, ..., n, ...)."""
    return None if t is None else t[0].unflatten(axis - 1, (count, -1)).movedim(axis - 1, 0)


def _packed(t: Tensor, axis: int) -> Tensor:
    """Undo `_unpacked`."""
    return t.movedim(0, axis - 1).flatten(axis - 1, axis)[None]


def take(tensors: Sequence[Tensor | None], axes: Sequence[int], tokens: slice) -> list[Tensor | None]:
    """Return the part of each tensor, (1, ..., N, ...) or None, that belongs to the range of tokens."""
    narrowed = zip(tensors, axes, strict=True)
    return [
        t if t is None else t.narrow(axis, tokens.start, tokens.stop - tokens.start) for t, axis in narrowed
    ]

"""Distributes the tokens of one sequence over the ranks of torch.distributed.

The tokens are cut into two chunks for each of W ranks, and rank r takes chunks r and 2W - 1 - r. In a causal
model the first token sees one key and the last one sees all. Each pair of chunks sees equally many keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """The distribution of n tokens over the ranks of a group.

    Each rank has two chunks. The numbers of tokens of two ranks differ by one at most.
    """

    n: int
    rank: int
    world: int
    group: Any = None

    def chunks(self, rank: int) -> list[slice]:
        """Return the two chunks of tokens of a rank, in order. Chunks may be empty."""
        size, more = divmod(self.n, 2 * self.world)
        starts = [chunk * size + min(chunk, more) for chunk in range(2 * self.world + 1)]
        return [slice(starts[chunk], starts[chunk + 1]) for chunk in (rank, 2 * self.world - 1 - rank)]

    @property
    def own(self) -> list[slice]:
        """Return the two chunks of this rank."""
        return self.chunks(self.rank)

    def take(self, t: Tensor, dim: int) -> Tensor:
        """Return the rank's share (..., m, ...) of a tensor (..., n, ...) with the tokens on axis `dim`."""
        return torch.cat([t.narrow(dim, chunk.start, chunk.stop - chunk.start) for chunk in self.own], dim)

    def gather(self, t: Tensor, dim: int) -> Tensor:
        """Return the whole tensor (..., n, ...) whose axis `dim` is split over the ranks."""
        largest = -(-self.n // self.world)
        t = t.movedim(dim, 0).contiguous()
        # Every rank must send the same number of tokens.
        mine = t if t.shape[0] == largest else torch.cat([t, t[-1:]])
        parts = t.new_empty(self.world * largest, *t.shape[1:])
        dist.all_gather_into_tensor(parts, mine, group=self.group)
        whole = t.new_empty(self.n, *t.shape[1:])
        for rank, part in enumerate(parts.split(largest)):
            _spread(part, whole, self.chunks(rank), 0)
        return whole.movedim(0, dim)

    def place(self, t: Tensor, dim: int) -> Tensor:
        """Return a tensor (..., n, ...) with the rank's own tokens in their places.

        The other entries are 0. They are never read.
        """
        whole = t.new_zeros(*t.shape[:dim], self.n, *t.shape[dim + 1 :])
        _spread(t, whole, self.own, dim)
        return whole


def _spread(part: Tensor, whole: Tensor, chunks: list[slice], dim: int) -> None:
    """Copy entries that are adjacent in `part` to chunks of axis `dim` of `whole`.

    Entries of `part` beyond the size of all chunks are ignored.
    """
    at = 0
    for chunk in chunks:
        size = chunk.stop - chunk.start
        whole.narrow(dim, chunk.start, size).copy_(part.narrow(dim, at, size))
        at += size

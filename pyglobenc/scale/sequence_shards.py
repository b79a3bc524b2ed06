"""How the tokens of one sequence lie on the ranks of torch.distributed.

They are cut into two chunks a rank, and rank r takes chunk r and chunk 2W - 1 - r: of a causal model the
first token sees one key and the last one all, and every such pair of chunks sees as many.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """How n tokens lie on the ranks of a group: two chunks each, shares differing by one token at most."""

    n: int
    rank: int
    world: int
    group: Any = None

    def chunks(self, rank: int) -> list[slice]:
        """The tokens of a rank's share, in order; chunks may be empty."""
        size, more = divmod(self.n, 2 * self.world)
        starts = [chunk * size + min(chunk, more) for chunk in range(2 * self.world + 1)]
        return [slice(starts[chunk], starts[chunk + 1]) for chunk in (rank, 2 * self.world - 1 - rank)]

    @property
    def own(self) -> list[slice]:
        return self.chunks(self.rank)

    def take(self, t: Tensor, dim: int) -> Tensor:
        """The rank's own share of a tensor of all tokens."""
        return torch.cat([t.narrow(dim, chunk.start, chunk.stop - chunk.start) for chunk in self.own], dim)

    def gather(self, t: Tensor, dim: int) -> Tensor:
        """The whole of a tensor whose axis dim is split over the ranks."""
        largest = -(-self.n // self.world)
        t = t.movedim(dim, 0).contiguous()
        # every rank must send as much as the others
        mine = t if t.shape[0] == largest else torch.cat([t, t[-1:]])
        parts = t.new_empty(self.world * largest, *t.shape[1:])
        dist.all_gather_into_tensor(parts, mine, group=self.group)
        whole = t.new_empty(self.n, *t.shape[1:])
        for rank, part in enumerate(parts.split(largest)):
            _spread(part, whole, self.chunks(rank), 0)
        return whole.movedim(0, dim)

    def place(self, t: Tensor, dim: int) -> Tensor:
        """A tensor of all tokens' size with the rank's own in their places; the others are never read."""
        whole = t.new_zeros(*t.shape[:dim], self.n, *t.shape[dim + 1 :])
        _spread(t, whole, self.own, dim)
        return whole


def _spread(part: Tensor, whole: Tensor, chunks: list[slice], dim: int) -> None:
    """Write what lies side by side in part, and maybe more, to chunks of axis dim of whole."""
    at = 0
    for chunk in chunks:
        size = chunk.stop - chunk.start
        whole.narrow(dim, chunk.start, size).copy_(part.narrow(dim, at, size))
        at += size

"""Distributes the tokens of one sequence over the ranks of torch.distributed.

The tokens are cut into two chunks for each of W ranks, and rank r takes chunks r and 2W - 1 - r. In a causal
model the first token sees one key and the last one sees all. Each pair of chunks sees equally many keys.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyglobenc.backends.shared.masks import visible_keys

Item = TypeVar("Item")


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

    def wanted(self, owner: int, reader: int, window: tuple[int, int]) -> list[slice]:
        """Return which tokens of the rank `owner` the queries of the rank `reader` see, in order.

        The slices don't overlap, and none is empty.
        """
        seen = [visible_keys(rows, self.n, window) for rows in self.chunks(reader) if rows.start < rows.stop]
        pieces, end = [], 0
        for chunk in self.chunks(owner):
            for keys in seen:
                start, stop = max(chunk.start, keys.start, end), min(chunk.stop, keys.stop)
                if start < stop:
                    pieces.append(slice(start, stop))
                    end = stop
        return pieces

    def gather(self, t: Tensor, dim: int, window: tuple[int, int]) -> "Gather":
        """Start to gather the tokens that this rank's queries see through a window.

        Every rank sends its tokens only to the ranks that need them, straight into their places there.

        Args:
            t: the rank's share (..., m, ...), with the tokens on axis `dim`.
            dim: the axis.
            window: as for `pyglobenc.ops.attention`.
        """
        whole = self.place(t.movedim(dim, 0), 0)
        group = dist.group.WORLD if self.group is None else self.group
        transfers = [
            dist.P2POp(send_or_receive, whole[piece], dist.get_global_rank(group, peer), group)
            for peer in range(self.world)
            if peer != self.rank
            for send_or_receive, way in ((dist.isend, (self.rank, peer)), (dist.irecv, (peer, self.rank)))
            for piece in self.wanted(*way, window)
        ]
        return Gather(whole, dim, dist.batch_isend_irecv(transfers) if transfers else [])

    def place(self, t: Tensor, dim: int) -> Tensor:
        """Return a tensor (..., n, ...) with the rank's own tokens in their places, and 0 elsewhere."""
        whole = t.new_zeros(*t.shape[:dim], self.n, *t.shape[dim + 1 :])
        at = 0
        for chunk in self.own:
            size = chunk.stop - chunk.start
            whole.narrow(dim, chunk.start, size).copy_(t.narrow(dim, at, size))
            at += size
        return whole


@dataclass
class Gather:
    """A tensor whose entries other ranks are sending."""

    whole: Tensor | None
    dim: int
    transfers: list[Any]

    def wait(self) -> Tensor:
        """Return the tensor (..., n, ...) when its entries are there, and forget it.

        Entries that no query of this rank sees are 0.
        """
        for transfer in self.transfers:
            transfer.wait()
        whole, self.whole = self.whole, None
        return whole.movedim(0, self.dim)


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items in order, each after the next one is made.

    So the gathers that the next item starts run while the caller works on this one.
    """
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.popleft()
    yield from waiting

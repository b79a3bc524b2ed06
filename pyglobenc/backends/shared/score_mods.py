"""What some architectures do to the scaled scores before the softmax, rebuilt for any tile of (query, key) pairs.

A score mod is bound to a layer's queries and keys once and then maps tiles: nothing (n, n) is needed to rebuild probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

# of scaled scores (B, H, m, J), rows of the bound queries, their positions (b, m), b = 1 or B, and columns of the keys: the new scores
Tile = Callable[[Tensor, slice, Tensor, slice], Tensor]
Mod = TypeVar("Mod", bound="ScoreMod")


class ScoreMod(Protocol):
    """A change of the scaled scores."""

    def bind(self, q: Tensor, k: Tensor) -> Tile:
        """Tile function for queries q (B, H, m, dh) and keys k (B, H, n, dh), both unscaled."""

    def diagonal(self, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """New scores (B, H, n) of every query with its own key; scores (B, H, n), q and k (B, H, n, dh)."""


def to_dtype(mod: Mod, dtype: torch.dtype) -> Mod:
    """The same mod, its floating-point tensors detached and in another dtype."""
    tensors = {f.name: getattr(mod, f.name) for f in fields(mod)}
    return replace(mod, **{n: t.detach().to(dtype) for n, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()})


@dataclass(frozen=True)
class SoftCap:
    """cap * tanh(score / cap) (Gemma 2)."""

    cap: float

    def bind(self, q: Tensor, k: Tensor) -> Tile:
        return lambda scores, rows, i, cols: self.cap * torch.tanh(scores / self.cap)

    def diagonal(self, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)


@dataclass(frozen=True)
class RelativeBias:
    """A bias of each head for each distance (MPNet): table (H, 2n - 1), entry n - 1 + j - i is added."""

    table: Tensor

    def bind(self, q: Tensor, k: Tensor) -> Tile:
        table = self.table.to(q.dtype)
        return lambda scores, rows, i, cols: scores + table[:, distances(i, cols, k.shape[2])].transpose(0, 1)

    def diagonal(self, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return scores + self.table[:, scores.shape[2] - 1, None].to(q.dtype)


@dataclass(frozen=True)
class StoredBias:
    """A bias (1 or B, H or 1, n, n) that the model itself makes (BEiT)."""

    bias: Tensor

    def bind(self, q: Tensor, k: Tensor) -> Tile:
        bias = self.bias.to(q.dtype).expand(q.shape[0], q.shape[1], -1, -1)

        def tile(scores: Tensor, rows: slice, i: Tensor, cols: slice) -> Tensor:
            index = i[:, None, :, None].expand(scores.shape)
            return scores + bias[..., cols].gather(2, index)

        return tile

    def diagonal(self, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return scores + torch.diagonal(self.bias, dim1=2, dim2=3).to(q.dtype)


@dataclass(frozen=True)
class DisentangledBias:
    """Content-to-position and position-to-content terms (DeBERTa-v2 and v3; He et al., 2021, eq. 4).

        score += scaling * (q[i] . position_keys[bucket] + k[j] . position_queries[bucket])

    Attributes:
        position_keys, position_queries: (H, P, dh) for P buckets, or None for a term that the model leaves out.
        buckets: (2n - 1) int64, bucket of the distance j - i at entry n - 1 + j - i.
        scaling: of both terms.
    """

    position_keys: Tensor | None
    position_queries: Tensor | None
    buckets: Tensor
    scaling: float

    def bind(self, q: Tensor, k: Tensor) -> Tile:
        """The tables are (B, H, m, P) and (B, H, n, P): linear in n."""
        of_queries = self._table(q, self.position_keys)
        of_keys = self._table(k, self.position_queries)

        def tile(scores: Tensor, rows: slice, i: Tensor, cols: slice) -> Tensor:
            bucket = self.buckets[distances(i, cols, k.shape[2])][:, None].expand(scores.shape)
            if of_queries is not None:
                scores = scores + of_queries[:, :, rows].gather(3, bucket)
            if of_keys is not None:
                scores = scores + of_keys[:, :, cols].gather(3, bucket.transpose(2, 3)).transpose(2, 3)
            return scores

        return tile

    def _table(self, t: Tensor, positions: Tensor | None) -> Tensor | None:
        return None if positions is None else t @ positions.to(t.dtype).transpose(1, 2) * self.scaling

    def diagonal(self, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = self.buckets[q.shape[2] - 1 : q.shape[2]]
        for t, positions in ((q, self.position_keys), (k, self.position_queries)):
            if positions is not None:
                scores = scores + (t @ positions[:, own].mT.to(t.dtype))[..., 0] * self.scaling
        return scores


def distances(i: Tensor, cols: slice, n: int) -> Tensor:
    """n - 1 + j - i of queries at positions i (b, m) and keys cols, of n: (b, m, J)."""
    j = torch.arange(cols.start, cols.stop, device=i.device)
    return j[None, None, :] - i[:, :, None] + (n - 1)

"""Changes that some architectures make to the scaled scores before the softmax.

A score mod is bound once to a layer's queries and keys. It then maps any tile of (query, key) pairs, so that
attention probabilities can be rebuilt without an (n, n) array.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

# Maps scaled scores (B, H, m, J) to new ones, given the rows of the bound queries, the positions (1 or B, m)
# of these queries, and the range of keys.
TileScores = Callable[[Tensor, slice, Tensor, slice], Tensor]
Mod = TypeVar("Mod", bound="ScoreMod")


class ScoreMod(Protocol):
    """A change of the scaled scores before the softmax."""

    def bind(self, q: Tensor, k: Tensor) -> TileScores:
        """Return the function that maps tiles of scores.

        q (B, H, m, dh) and k (B, H, n, dh) are the unscaled queries and keys.
        """

    def diagonal(self, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Return the new scores (B, H, n) of each query with its own key.

        scores are (B, H, n); q and k are (B, H, n, dh).
        """


def to_dtype(mod: Mod, dtype: torch.dtype) -> Mod:
    """Return the score mod with its floating-point tensors, of any shape, detached and in another dtype."""
    tensors = {f.name: getattr(mod, f.name) for f in fields(mod)}
    return replace(
        mod,
        **{
            n: t.detach().to(dtype)
            for n, t in tensors.items()
            if isinstance(t, Tensor) and t.is_floating_point()
        },
    )


@dataclass(frozen=True)
class SoftCap:
    """cap * tanh(score / cap) (Gemma 2)."""

    cap: float

    def bind(self, q: Tensor, k: Tensor) -> TileScores:
        return lambda scores, rows, i, cols: self.cap * torch.tanh(scores / self.cap)

    def diagonal(self, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)


@dataclass(frozen=True)
class RelativeBias:
    """A bias for each head and distance (MPNet): entry n - 1 + j - i of table (H, 2n - 1) is added."""

    table: Tensor

    def bind(self, q: Tensor, k: Tensor) -> TileScores:
        table = self.table.to(q.dtype)
        return lambda scores, rows, i, cols: scores + table[:, distances(i, cols, k.shape[2])].transpose(0, 1)

    def diagonal(self, scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return scores + self.table[:, scores.shape[2] - 1, None].to(q.dtype)


@dataclass(frozen=True)
class StoredBias:
    """A bias (1 or B, H or 1, n, n) that the model itself stores (BEiT)."""

    bias: Tensor

    def bind(self, q: Tensor, k: Tensor) -> TileScores:
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
        position_keys, position_queries: (H, P, dh) for P buckets; None for a term that the model does not
            have.
        buckets: (2n - 1) int64, bucket of the distance j - i at entry n - 1 + j - i.
        scaling: factor of both terms.
    """

    position_keys: Tensor | None
    position_queries: Tensor | None
    buckets: Tensor
    scaling: float

    def bind(self, q: Tensor, k: Tensor) -> TileScores:
        """Return the tile function; its two tables, (B, H, m, P) and (B, H, n, P), are linear in n."""
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
    """Return n - 1 + j - i, (b, m, J), for queries at positions i (b, m) and the keys in cols."""
    j = torch.arange(cols.start, cols.stop, device=i.device)
    return j[None, None, :] - i[:, :, None] + (n - 1)

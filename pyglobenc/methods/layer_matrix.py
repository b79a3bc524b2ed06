"""What a layer contributes to a rollout: an (n, n) matrix, row i a query's sources, that need not be stored.

Every kind gives single rows, the product of rows with the matrix, and, only when asked, the matrix itself.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyglobenc.ops import rollout_step, token_norms
from pyglobenc.reference.rollout_step import rescale_rows

ROW_BLOCK = 64


class LayerMatrix(Protocol):
    """One layer's (B, n, n) matrix of a rollout."""

    def rows(self, targets: Tensor) -> Tensor:
        """Rows `targets` (B, T) of the matrix: (B, T, n)."""

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """r (B, T, n) times the matrix, each row scaled to maximum 1, and the new log_scale (B, T)."""

    def full(self) -> Tensor:
        """The matrix, (B, n, n)."""


@dataclass
class NormMatrix:
    """Norms of one stage's decomposed vectors, as `pyglobenc.ops.token_norms` defines them; fields as its arguments."""

    q: Tensor
    k: Tensor
    lse: Tensor
    gram: Tensor
    cross: Tensor | None
    residual_sq: Tensor | None
    rstd: Tensor | None
    key_mask: Tensor | None
    scaling: float
    window: tuple[int, int]
    backend: str

    def _args(self) -> dict:
        names = ("q", "k", "lse", "gram", "cross", "residual_sq", "rstd", "key_mask", "scaling", "window", "backend")
        return {name: getattr(self, name) for name in names}

    def rows(self, targets: Tensor) -> Tensor:
        return token_norms(**self._args(), rows=targets)

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        return rollout_step(r, log_scale, **self._args())

    def full(self) -> Tensor:
        return token_norms(**self._args())

    def row_sums(self) -> Tensor:
        """Sum of every row, (B, n), a block of rows at a time."""
        batch, _, n, _ = self.q.shape
        index = torch.arange(n, device=self.q.device).expand(batch, n)
        return torch.cat([self.rows(block).sum(-1) for block in index.split(ROW_BLOCK, dim=1)], dim=1)


@dataclass
class StoredMatrix:
    """A matrix that exists, (B, n, n)."""

    matrix: Tensor

    def rows(self, targets: Tensor) -> Tensor:
        return self.matrix.gather(1, targets[..., None].expand(-1, -1, self.matrix.shape[2]))

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        return rescale_rows(r @ self.matrix, log_scale)

    def full(self) -> Tensor:
        return self.matrix


@dataclass
class ResidualMatrix:
    """diag(weight) (A - diag(own)) + diag(kept): a layer's matrix A beside an explicit residual connection, each vector (B, n)."""

    inner: NormMatrix
    weight: Tensor
    own: Tensor | None
    kept: Tensor

    def rows(self, targets: Tensor) -> Tensor:
        rows = self.inner.rows(targets)
        if self.own is not None:
            rows = rows.scatter(2, targets[..., None], 0)
        kept = torch.zeros_like(rows).scatter_(2, targets[..., None], self.kept.gather(1, targets)[..., None])
        return rows * self.weight.gather(1, targets)[..., None] + kept

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        weighted = r * self.weight[:, None]
        mixed, mixed_log = self.inner.step(weighted, torch.zeros_like(log_scale))
        mixed = mixed * mixed_log.exp()[..., None]
        if self.own is not None:
            mixed = (mixed - weighted * self.own[:, None]).clamp_(min=0)
        return rescale_rows(mixed + r * self.kept[:, None], log_scale)

    def full(self) -> Tensor:
        matrix = self.inner.full()
        if self.own is not None:
            matrix.diagonal(dim1=1, dim2=2).zero_()
        return matrix * self.weight[..., None] + torch.diag_embed(self.kept)

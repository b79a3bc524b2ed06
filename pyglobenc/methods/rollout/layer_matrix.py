"""What a layer contributes to a rollout: an (n, n) matrix, row i a query's sources, that need not be stored.

Every kind gives single rows, the product of rows with the matrix, and, only when asked, the matrix itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pyglobenc.backends.reference.rollout_step import rescale_rows
from pyglobenc.backends.reference.rollout_step import rollout_step as reference_rollout_step
from pyglobenc.backends.reference.token_norms import token_norms as reference_token_norms
from pyglobenc.backends.shared.packing import per_token, slices, take
from pyglobenc.backends.shared.score_mods import ScoreMod, to_dtype
from pyglobenc.ops import rollout_step, token_norms

ROW_BLOCK = 64


def check_score_mod(who: str, backend: str) -> None:
    """Raise ValueError if a backend is asked for by name that can't compute scores that a model changes before the softmax."""
    if backend not in ("auto", "reference"):
        raise ValueError(f"{who}: backend {backend!r} has no kernel for scores with a bias or a soft cap, which this model has; use 'auto'")


class LayerMatrix(Protocol):
    """One layer's (B, n, n) matrix of a rollout; of S packed sequences the blocks of a block-diagonal one, (1, N, N)."""

    def rows(self, targets: Tensor) -> Tensor:
        """Rows `targets` (B, T) of the matrix: (B, T, n)."""

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """r (B, T, n) times the matrix, each row scaled to maximum 1, and the new log_scale (B, T), of packed sequences (S, T)."""

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
    score_mod: ScoreMod | None = None
    offsets: Tensor | None = None

    def __post_init__(self):
        if self.score_mod is not None:
            check_score_mod("NormMatrix", self.backend)
            self.score_mod = to_dtype(self.score_mod, self.gram.dtype)

    def _args(self) -> dict:
        names = ("q", "k", "lse", "gram", "cross", "residual_sq", "rstd", "key_mask", "scaling", "window", "backend")
        return {name: getattr(self, name) for name in names}

    def rows(self, targets: Tensor) -> Tensor:
        targets = targets.to(self.q.device)
        return token_norms(**self._args(), rows=targets) if self.score_mod is None else self._modified(targets)

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        # the layers of a model may lie on several devices
        r, log_scale = r.to(self.gram), log_scale.to(self.gram)
        if self.score_mod is None:
            return rollout_step(r, log_scale, **self._args(), offsets=self.offsets)
        tensors = (self.q, self.k, self.lse, self.gram, self.cross, self.residual_sq, self.rstd, self.key_mask)
        return reference_rollout_step(r, log_scale, *tensors, self.scaling, self.window, self.offsets, self.score_mod)

    def full(self) -> Tensor:
        return token_norms(**self._args()) if self.score_mod is None else self._modified(None)

    def _modified(self, targets: Tensor | None) -> Tensor:
        tensors = (self.q, self.k, self.lse, self.gram, self.cross, self.residual_sq, self.rstd, self.key_mask, targets)
        return reference_token_norms(*tensors, self.scaling, self.window, self.score_mod)

    def row_sums(self) -> Tensor:
        """Sum of every row, (B, n), a block of rows at a time."""
        if self.offsets is not None:
            return torch.cat([matrix.row_sums() for matrix in self._sequences()], dim=1)
        batch, _, n, _ = self.q.shape
        index = torch.arange(n, device=self.q.device).expand(batch, n)
        return torch.cat([self.rows(block).sum(-1) for block in index.split(ROW_BLOCK, dim=1)], dim=1)

    def _sequences(self) -> Iterator["NormMatrix"]:
        """Each of the packed sequences alone."""
        axes = dict(q=2, k=2, lse=2, gram=1, cross=1, residual_sq=1, rstd=1)
        for tokens in slices(self.offsets):
            parts = take([getattr(self, name) for name in axes], list(axes.values()), tokens)
            yield replace(self, **dict(zip(axes, parts, strict=True)), offsets=None)


@dataclass
class StoredMatrix:
    """A matrix that exists, (B, n, n)."""

    matrix: Tensor

    def rows(self, targets: Tensor) -> Tensor:
        return self.matrix.gather(1, targets.to(self.matrix.device)[..., None].expand(-1, -1, self.matrix.shape[2]))

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        r, log_scale = r.to(self.matrix), log_scale.to(self.matrix)
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
        rows, targets = self.inner.rows(targets), targets.to(self.kept.device)
        if self.own is not None:
            rows = rows.scatter(2, targets[..., None], 0)
        kept = torch.zeros_like(rows).scatter_(2, targets[..., None], self.kept.gather(1, targets)[..., None])
        return rows * self.weight.gather(1, targets)[..., None] + kept

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        r, log_scale, offsets = r.to(self.kept), log_scale.to(self.kept), self.inner.offsets
        weighted = r * self.weight[:, None]
        mixed, mixed_log = self.inner.step(weighted, torch.zeros_like(log_scale))
        mixed = mixed * (mixed_log.exp()[..., None] if offsets is None else per_token(mixed_log.exp(), offsets))
        if self.own is not None:
            mixed = (mixed - weighted * self.own[:, None]).clamp_(min=0)
        return rescale_rows(mixed + r * self.kept[:, None], log_scale, offsets)

    def full(self) -> Tensor:
        matrix = self.inner.full()
        if self.own is not None:
            matrix.diagonal(dim1=1, dim2=2).zero_()
        return matrix * self.weight[..., None] + torch.diag_embed(self.kept)

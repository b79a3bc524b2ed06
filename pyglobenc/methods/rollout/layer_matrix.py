"""The matrix that a layer contributes to a rollout: (n, n), with the sources of query i in row i.

Every kind of matrix returns single rows, multiplies rows with the matrix, and builds the full matrix only
when it is asked to. So the matrix need not be stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.packing import per_token, slices, take
from pyglobenc.backends.shared.rows import rescale_rows
from pyglobenc.ops import pair_norms, rollout_step

ROW_BLOCK = 64


class LayerMatrix(Protocol):
    """One layer's (B, n, n) matrix of a rollout.

    For S packed sequences the matrix is (1, N, N) and block-diagonal, with one block for each sequence.
    """

    def rows(self, targets: Tensor) -> Tensor:
        """Return the rows `targets` (B, T) of the matrix, (B, T, n)."""

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply r (B, T, n) with the matrix and scale each row to maximum 1.

        Returns:
            The rows (B, T, n) and the new log_scale (B, T). For S packed sequences log_scale is (S, T).
        """

    def full(self) -> Tensor:
        """Return the matrix, (B, n, n)."""


@dataclass
class NormMatrix:
    """Norms of the decomposed vectors of one stage, (B, n, n), as `pyglobenc.ops.pair_norms` defines them."""

    inputs: PairInputs
    backend: str

    def rows(self, targets: Tensor) -> Tensor:
        return self._norms(targets.to(self.inputs.device))

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        # The layers of a model may be on several devices.
        r, log_scale = r.to(self.inputs.gram), log_scale.to(self.inputs.gram)
        return rollout_step(r, log_scale, **self.inputs.arguments(), backend=self.backend)

    def full(self) -> Tensor:
        return self._norms(None)

    def _norms(self, targets: Tensor | None) -> Tensor:
        arguments = self.inputs.arguments()
        # `pair_norms` takes no packed sequences. Their rows and norms are computed one sequence at a time.
        del arguments["cu_seqlens"]
        return pair_norms(**arguments, rows=targets, backend=self.backend)

    def row_sums(self) -> Tensor:
        """Return the sum of every row, (B, n), computed from one block of rows at a time."""
        if self.inputs.cu_seqlens is not None:
            return torch.cat([matrix.row_sums() for matrix in self._sequences()], dim=1)
        batch, _, n, _ = self.inputs.q.shape
        index = torch.arange(n, device=self.inputs.device).expand(batch, n)
        return torch.cat([self.rows(block).sum(-1) for block in index.split(ROW_BLOCK, dim=1)], dim=1)

    def _sequences(self) -> Iterator["NormMatrix"]:
        """Yield the matrix of each packed sequence alone."""
        given = self.inputs.of_tokens()
        axes = [self.inputs.AXES[name] for name in given]
        for tokens in slices(self.inputs.cu_seqlens):
            parts = take(list(given.values()), axes, tokens)
            own = self.inputs.replace(**dict(zip(given, parts, strict=True)), cu_seqlens=None)
            yield NormMatrix(own, self.backend)


@dataclass
class StoredMatrix:
    """A matrix that is stored, (B, n, n)."""

    matrix: Tensor

    def rows(self, targets: Tensor) -> Tensor:
        return self.matrix.gather(
            1, targets.to(self.matrix.device)[..., None].expand(-1, -1, self.matrix.shape[2])
        )

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        r, log_scale = r.to(self.matrix), log_scale.to(self.matrix)
        return rescale_rows(r @ self.matrix, log_scale)

    def full(self) -> Tensor:
        return self.matrix


@dataclass
class ResidualMatrix:
    """A layer's matrix A with an explicit residual: diag(weight) (A - diag(own)) + diag(kept).

    The vectors weight, own and kept are (B, n). None for own means zeros.
    """

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
        r, log_scale, cu_seqlens = r.to(self.kept), log_scale.to(self.kept), self.inner.inputs.cu_seqlens
        weighted = r * self.weight[:, None]
        mixed, mixed_log = self.inner.step(weighted, torch.zeros_like(log_scale))
        mixed = mixed * (
            mixed_log.exp()[..., None] if cu_seqlens is None else per_token(mixed_log.exp(), cu_seqlens)
        )
        if self.own is not None:
            mixed = (mixed - weighted * self.own[:, None]).clamp_(min=0)
        return rescale_rows(mixed + r * self.kept[:, None], log_scale, cu_seqlens)

    def full(self) -> Tensor:
        matrix = self.inner.full()
        if self.own is not None:
            matrix.diagonal(dim1=1, dim2=2).zero_()
        return matrix * self.weight[..., None] + torch.diag_embed(self.kept)

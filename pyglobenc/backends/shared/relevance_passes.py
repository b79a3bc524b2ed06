"""Relevance through attention by a GPU's kernels: a pass over rows, one over columns, and what the host does around them.

The pass over rows gives R_q, the sums of A's rows and, with an additive mask, what its factor needs; the pass over columns gives R_k, R_v
and each head's part of the rollout step. The formulas are those of `pyglobenc.ops.relevance_attention`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from pyglobenc.backends.reference.relevance_attention import rescale_scores
from pyglobenc.backends.shared.packing import on_device, sequence_sums


@dataclass(frozen=True)
class Passes:
    """One layer's pairs; fields as the arguments of `pyglobenc.ops.relevance_attention`. Backends add the launches."""

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    grad_o: Tensor | None
    s: Tensor
    key_mask: Tensor | None
    scaling: float
    window: tuple[int, int]
    additive_mask: bool = False
    stabilizer: float = 0.0
    offsets: Tensor | None = None

    # rows of the rollout that one pass over columns carries
    most_rows: ClassVar[int]

    @cached_property
    def examples(self) -> tuple[Tensor | None, int, int]:
        """Offsets on the device, or None; how many examples, or packed sequences, there are; how many tokens the longest has."""
        if self.offsets is None:
            return None, self.q.shape[0], self.q.shape[2]
        ends, longest = on_device(self.offsets, self.q.device)
        return ends, len(ends) - 1, longest

    def launch_rows(self, r_q: Tensor | None, sums: Tensor) -> None:
        """Fill R_q (B, H, n, dh) but for the mask's factor, if given, and the sums of A_h's rows, (1, B, H, n) float64; with an additive
        mask (3, B, H, n), also of R_alpha's and R''s."""
        raise NotImplementedError

    def launch_columns(self, w: Tensor | None, r_k: Tensor | None, r_v: Tensor | None, step: Tensor | None) -> None:
        """Fill R_k but for the mask's factor, R_v (B, H, n, dh), and step (B, H, T, n): w (B, T, n) times each A_h. None: not wanted."""
        raise NotImplementedError

    def relevance(self, r: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), r_out (B, T, n) or None without r."""
        r_q, r_k, r_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (self.q, self.k, self.v))
        if self.q.numel() == 0:
            row_sums = self.q.new_zeros(self.q.shape[0], self.q.shape[2])
            return r_q, r_k, r_v, row_sums, None if r is None else r.clone(memory_format=torch.contiguous_format)
        row_sums, totals = self._rows(r_q)
        r_out = self._columns(r, row_sums if normalize else None, r_k, r_v)
        if self.additive_mask:
            self._rescale(r_q, r_k, totals)
        return r_q, r_k, r_v, row_sums, r_out

    def _rescale(self, r_q: Tensor, r_k: Tensor, totals: Tensor) -> None:
        """Multiply R_q and R_k by the mask's factor, from `_rows`."""
        if self.offsets is None:
            rescale_scores(r_q, r_k, *totals.sum((2, 3)))
            return
        # a token takes the place of an example, with the sums of its sequence
        sums = torch.stack([sequence_sums(t.sum(1), self.offsets) for t in totals])
        lengths = self.offsets.diff().to(sums.device, non_blocking=True)
        # told the size, torch doesn't wait for the device
        sums = sums.repeat_interleave(lengths, 1, output_size=totals.shape[3])
        rescale_scores(r_q.movedim(2, 0), r_k.movedim(2, 0), *sums)

    def rollout_step(self, r: Tensor, normalize: bool) -> Tensor:
        """r_out (B, T, n) alone."""
        if r.numel() == 0 or self.q.numel() == 0:
            return r.clone(memory_format=torch.contiguous_format)
        return self._columns(r, self._rows()[0] if normalize else None)

    def _rows(self, r_q: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sums of A's rows, (B, n), and, with an additive mask, of R_alpha's and R''s, (2, B, H, n) float64; fills r_q if given."""
        sums = self.q.new_empty(3 if self.additive_mask else 1, *self.q.shape[:3], dtype=torch.float64)
        self.launch_rows(r_q, sums)
        return sums[0].mean(1).to(self.q.dtype), sums[1:]

    def _columns(self, r: Tensor | None, row_sums: Tensor | None, r_k: Tensor | None = None, r_v: Tensor | None = None) -> Tensor | None:
        """w (I + A) (B, T, n), w = r, or r / (1 + row_sums) if given; fills what is given."""
        if r is None:
            self.launch_columns(None, r_k, r_v, None)
            return None
        w = r if row_sums is None else r / (1 + row_sums)[:, None]
        steps = []
        for part in w.split(self.most_rows, dim=1):
            step = part.new_empty(*self.q.shape[:2], part.shape[1], self.q.shape[2])
            self.launch_columns(part, r_k, r_v, step)
            steps.append(step.mean(1))
            # once is enough
            r_k = r_v = None
        return torch.cat(steps, 1) + w

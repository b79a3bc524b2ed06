"""Relevance through attention on a GPU: two passes of a kernel, and what the host does around them.

The pass over rows computes R_q, the row sums of A, and with an additive mask the sums that its factor needs.
The pass over columns computes R_k, R_v and each head's part of the rollout step.
`pyglobenc.ops.relevance_attention` gives the formulas.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.packing import on_device, sequence_sums
from pyglobenc.backends.shared.relevance_tiles import rescale_scores


@dataclass(frozen=True)
class Passes:
    """The two passes over one layer's pairs; a backend adds the launches."""

    inputs: RelevanceInputs

    # The number of rows of the rollout that one pass over columns handles.
    most_rows: ClassVar[int]

    @cached_property
    def examples(self) -> tuple[Tensor | None, int, int]:
        """Return cu_seqlens on the device or None, the number of examples, and the longest one's length.

        Each packed sequence counts as an example.
        """
        if self.inputs.cu_seqlens is None:
            return None, self.inputs.q.shape[0], self.inputs.q.shape[2]
        ends, longest = on_device(self.inputs.cu_seqlens, self.inputs.q.device)
        return ends, len(ends) - 1, longest

    def launch_rows(self, r_q: Tensor | None, sums: Tensor) -> None:
        """Fill r_q (B, H, n, dh), if given, and sums.

        r_q becomes R_q without the factor of the additive mask. sums, float64, is (1, B, H, n): the row sums
        of A_h. With an additive mask it is (3, B, H, n), and also holds the row sums of R_alpha and of R'.
        """
        raise NotImplementedError

    def launch_columns(
        self, w: Tensor | None, r_k: Tensor | None, r_v: Tensor | None, step: Tensor | None
    ) -> None:
        """Fill r_k, r_v and step; each may be None.

        r_k, without the factor of the additive mask, and r_v are (B, H, n, dh). step (B, H, T, n) is w (B, T,
        n) times each A_h.
        """
        raise NotImplementedError

    def relevance(self, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), and r_out (B, T, n) or None without r."""
        r_q, r_k, r_v = (
            torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (self.inputs.q, self.inputs.k, self.inputs.v)
        )
        if self.inputs.q.numel() == 0:
            row_sums = self.inputs.q.new_zeros(self.inputs.q.shape[0], self.inputs.q.shape[2])
            return (
                r_q,
                r_k,
                r_v,
                row_sums,
                None if r is None else r.clone(memory_format=torch.contiguous_format),
            )
        row_sums, totals = self._rows(r_q)
        r_out = self._columns(r, row_sums if self.inputs.normalize else None, r_k, r_v)
        if self.inputs.additive_mask:
            self._rescale(r_q, r_k, totals)
        return r_q, r_k, r_v, row_sums, r_out

    def _rescale(self, r_q: Tensor, r_k: Tensor, totals: Tensor) -> None:
        """Multiply R_q and R_k by the factor of the additive mask; totals come from `_rows`."""
        if self.inputs.cu_seqlens is None:
            rescale_scores(r_q, r_k, *totals.sum((2, 3)))
            return
        # Each token stands for an example, with the sums of its sequence.
        sums = torch.stack([sequence_sums(t.sum(1), self.inputs.cu_seqlens) for t in totals])
        lengths = self.inputs.cu_seqlens.diff().to(sums.device, non_blocking=True)
        # With output_size, torch does not wait for the device.
        sums = sums.repeat_interleave(lengths, 1, output_size=totals.shape[3])
        rescale_scores(r_q.movedim(2, 0), r_k.movedim(2, 0), *sums)

    def rollout_step(self, r: Tensor) -> Tensor:
        """Return r_out (B, T, n) alone."""
        if r.numel() == 0 or self.inputs.q.numel() == 0:
            return r.clone(memory_format=torch.contiguous_format)
        return self._columns(r, self._rows()[0] if self.inputs.normalize else None)

    def product(self, r: Tensor) -> Tensor:
        """Return r A, (B, T, n), for r (B, T, n)."""
        if r.numel() == 0 or self.inputs.q.numel() == 0:
            return torch.zeros_like(r, memory_format=torch.contiguous_format)
        return self._steps(r)

    def _rows(self, r_q: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the row sums of A, (B, n), and those of R_alpha and R' in float64.

        The latter are (2, B, H, n) with an additive mask, and (0, B, H, n) without one.
        """
        sums = self.inputs.q.new_empty(
            3 if self.inputs.additive_mask else 1, *self.inputs.q.shape[:3], dtype=torch.float64
        )
        self.launch_rows(r_q, sums)
        return sums[0].mean(1).to(self.inputs.q.dtype), sums[1:]

    def _columns(
        self, r: Tensor | None, row_sums: Tensor | None, r_k: Tensor | None = None, r_v: Tensor | None = None
    ) -> Tensor | None:
        """Return w (I + A), (B, T, n), and fill r_k and r_v if they are given.

        w is r, or r / (1 + row_sums) if row_sums is given.
        """
        if r is None:
            self.launch_columns(None, r_k, r_v, None)
            return None
        w = r if row_sums is None else r / (1 + row_sums)[:, None]
        return self._steps(w, r_k, r_v) + w

    def _steps(self, w: Tensor, r_k: Tensor | None = None, r_v: Tensor | None = None) -> Tensor:
        """Return w A, (B, T, n), and fill r_k and r_v if they are given."""
        steps = []
        for part in w.split(self.most_rows, dim=1):
            step = part.new_empty(*self.inputs.q.shape[:2], part.shape[1], self.inputs.q.shape[2])
            self.launch_columns(part, r_k, r_v, step)
            steps.append(step.mean(1))
            # The first pass has already filled r_k and r_v.
            r_k = r_v = None
        return torch.cat(steps, 1)


def squared(inputs: RelevanceInputs, r: Tensor, transposed: bool) -> tuple[RelevanceInputs, Tensor]:
    """Return inputs and r whose r A is that of `relevance_product`, with as many queries as keys.

    The kernels take n queries and n keys. So the shorter side is padded: padded queries have r = 0, and
    padded keys are masked. A transposed product exchanges the roles of queries and keys. Then the log-sum-exp
    belongs to the keys, and becomes one more column of the scores' product:

        scaling q.k - lse = scaling ([k, 1] . [q, -lse / scaling])

    Args:
        inputs: with q (B, H, n, dh), k (B, H, m, dh) and s, without a gradient.
        r: (B, T, n), or with transposed (B, T, m).
        transposed: whether r A^T is wanted.

    Returns:
        Inputs with max(n, m) tokens on both sides, and r (B, T, max(n, m)).
    """
    size = max(inputs.q.shape[2], inputs.k.shape[2])

    def longer(t: Tensor | None, axis: int) -> Tensor | None:
        short = 0 if t is None else size - t.shape[axis]
        return t if not short else F.pad(t, (0, 0) * (t.dim() - 1 - axis) + (0, short))

    q, k, v, s, lse, mask = (getattr(inputs, name) for name in ("q", "k", "v", "s", "lse", "key_mask"))
    if not transposed:
        if mask is None and k.shape[2] < size:
            mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        changed = dict(q=longer(q, 2), k=longer(k, 2), v=longer(v, 2), s=longer(s, 2), lse=longer(lse, 2))
        return inputs.replace(**changed, key_mask=longer(mask, 1)), longer(r, 2)
    # A query that sees no key has an infinite log-sum-exp. With q = 0, a large one gives the same, 0.
    blind, large = lse.isinf(), -2 * math.log(torch.finfo(lse.dtype).tiny)
    column = -lse.masked_fill(blind, large) / inputs.scaling
    # The number of columns stays a multiple of 8, which the kernels copy fastest.
    width = 8 - q.shape[3] % 8
    # Masked keys are queries now, with an infinite log-sum-exp. Their rows may hold any values.
    hidden = torch.zeros_like(k[..., 0])
    if mask is not None:
        masked = ~mask[:, None]
        hidden = hidden.masked_fill(masked, math.inf)
        k, v = (t.masked_fill(masked[..., None], 0) for t in (k, v))
    keys = torch.cat([k, torch.ones_like(k[..., :1])], 3)
    queries = torch.cat([q.masked_fill(blind[..., None], 0), column[..., None]], 3)
    wider = [F.pad(t, (0, width - 1)) for t in (keys, queries)] + [F.pad(t, (0, width)) for t in (v, s)]
    keys, queries, values, gradients = (longer(t, 2) for t in wider)
    real = None
    if q.shape[2] < size:
        real = (torch.arange(size, device=q.device) < q.shape[2]).repeat(q.shape[0], 1)
    changed = dict(q=keys, k=queries, v=gradients, s=values, lse=longer(hidden, 2), key_mask=real)
    return inputs.replace(**changed, window=inputs.window[::-1]), longer(r, 2)


def product_reasons(
    reasons: Callable[[RelevanceInputs, Tensor], list[str]],
    inputs: RelevanceInputs,
    r: Tensor,
    transposed: bool,
) -> list[str]:
    """Return why a GPU backend can't run `relevance_product`.

    Args:
        reasons: returns why the backend can't take inputs with as many queries as keys.
        inputs, r, transposed: the arguments of the op, with r (B, T, n) or (B, T, m).
    """
    if transposed and inputs.scaling == 0:
        return ["divides by scaling, got 0"]
    return reasons(*squared(inputs, r, transposed))

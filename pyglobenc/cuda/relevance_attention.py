"""Launchers of csrc/cuda/relevance_attention.cu: the pass over rows, the pass over columns, and what lies between them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.cuda import _extension
from pyglobenc.cuda._relevance import new_like, relevance_reasons
from pyglobenc.reference.relevance_attention import rescale_scores

OUTPUTS = ("r_q", "r_k", "r_v", "sums", "step", "map", "totals")


@dataclass(frozen=True)
class Pairs:
    """The pairs of one layer; fields as the arguments of `pyglobenc.ops.relevance_attention`."""

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

    def launch(self, kernel: str, rows: Tensor | None = None, w: Tensor | None = None, **outputs: Tensor | None) -> None:
        """Run a kernel on the queries `rows` (B, m), None: all, and the rollout's rows w (B, T, n); outputs by their names in OUTPUTS."""
        n = self.q.shape[2]
        by_head = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (self.q, self.k, self.v, self.s, self.grad_o))
        tensors = (*by_head, self.lse, self.key_mask, rows, w)
        sides = (n if side < 0 else min(side, n) for side in self.window)
        with _extension.launching(self.q.device) as stream:
            run = getattr(_extension.kernels, kernel)
            out = tuple(outputs.get(name) for name in OUTPUTS)
            run(tensors, out, self.scaling, self.stabilizer, *sides, self.additive_mask, stream)

    def rows(self, relevance: bool = True) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """R_q (B, H, n, dh) without the additive mask's factor, A's row sums (B, n), sums of R_alpha and R' (2, B, H, n) float64."""
        r_q = new_like(self.q) if relevance else None
        sums = self.q.new_empty(self.q.shape[:3])
        totals = self.q.new_empty(2, *sums.shape, dtype=torch.float64) if relevance and self.additive_mask else None
        self.launch("relevance_rows", r_q=r_q, sums=sums, totals=totals)
        return r_q, sums.mean(1), totals

    def columns(self, r: Tensor | None, row_sums: Tensor | None, r_k: Tensor | None = None, r_v: Tensor | None = None) -> Tensor | None:
        """w (I + A) (B, T, n), w = r, or r / (1 + row_sums) if given; fills r_k and r_v (B, H, n, dh) if given."""
        if r is None:
            self.launch("relevance_columns", r_k=r_k, r_v=r_v)
            return None
        w = r if row_sums is None else r / (1 + row_sums)[:, None]
        steps = []
        for part in w.split(_extension.kernels.MOST_ROWS, dim=1):
            step = part.new_empty(*self.q.shape[:2], part.shape[1], self.q.shape[2])
            self.launch("relevance_columns", w=part, r_k=r_k, r_v=r_v, step=step)
            steps.append(step.mean(1))
            r_k = r_v = None
        return torch.cat(steps, 1) + w


def not_supported(
    q, k, v, lse, grad_o, s, r, key_mask, scaling, window, additive_mask, normalize, stabilizer, rescale=True
) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    return relevance_reasons(q, k=k, v=v, lse=lse, grad_o=grad_o, s=s, r=r, key_mask=key_mask)


def relevance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    r: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    additive_mask: bool,
    normalize: bool,
    stabilizer: float,
    rescale: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`: -> R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), r_out (B, T, n) or None."""
    if q.numel() == 0:
        empty = (new_like(q), new_like(q), new_like(q), q.new_zeros(q.shape[0], q.shape[2]))
        return *empty, None if r is None else r.clone(memory_format=torch.contiguous_format)
    pairs = Pairs(q, k, v, lse, grad_o, s, key_mask, scaling, window, additive_mask, stabilizer)
    r_q, row_sums, totals = pairs.rows()
    r_k, r_v = new_like(k), new_like(v)
    r_out = pairs.columns(r, row_sums if normalize else None, r_k, r_v)
    if additive_mask and rescale:
        rescale_scores(r_q, r_k, *totals.sum((2, 3)))
    return r_q, r_k, r_v, row_sums, r_out

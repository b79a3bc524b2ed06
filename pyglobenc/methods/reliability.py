"""How far rounding moves a result.

Relevance is divided by sums of both signs: a residual sum, the attention output, a score. Where such a sum is small beside its terms,
its rounding error, and that of the whole forward pass before it, is amplified. Two ways to say how much, both of the relative L2 error
of the scores without the pooled token's own entry, which the published code overwrites:

measured: once more from a first layer's input moved by about one rounding unit, and compared: costs as much again, less the gradient.

estimated: every tensor of relevance carries the expected squared norm of its error, in units of the rounding unit:

    division by b, c = a / b:    adds  l sum (c sigma / b)^2,  sigma^2 the mean square of the terms of b in a token, l the layers so far
    any other rule:              the error keeps its size relative to the relevance

a layer's map inherits the relative error of its relevance, and moves the scores by that part of what it adds to them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.hf import LayerTrace
from pyglobenc.reference.relevance_attention import query_tiles
from pyglobenc.reference.token_norms import take_queries

METHODS = ("auto", "measured", "estimated", "off")

# "auto" measures where that costs little: multiply-adds of a forward pass, a few hundredths of a second on two cores
MEASURED_BELOW = 1 << 31

# above this relative error a warning is given
DIGITS_GONE = 1e-2

TINY = 1e-300

# queries whose divisions by scores are looked at: those that carry most relevance
SAMPLED = 16

# squared error of a score beside that of a sum of the same size: both factors of its products come from matrix products
SCORE_ERROR = 16


class PrecisionWarning(UserWarning):
    """The digits of a result are lost to rounding."""


@dataclass
class Relevance:
    """Relevance of a tensor, (B, ...), and the expected squared norm of its error, (B,), in units of the rounding unit squared."""

    values: Tensor
    noise: Tensor

    def relative(self) -> Tensor:
        """Squared relative error, (B,)."""
        return self.noise / squared_norm(self.values).clamp_min(TINY)

    def like(self, values: Tensor) -> "Relevance":
        """Relevance that a rule made of this one."""
        return Relevance(values, self.relative() * squared_norm(values))


def squared_norm(t: Tensor) -> Tensor:
    """Sum of squares of every example, (B,), float64."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1).double().square()


def division_noise(quotient: Tensor, divisor: Tensor, *terms: Tensor) -> Tensor:
    """Squared error of quotients (B, ..., d) from that of their divisor, a sum of terms, (B,)."""
    scale = sum(torch.linalg.vector_norm(term, dim=-1, keepdim=True).square_() for term in terms).div_(divisor.shape[-1]).sqrt_()
    return squared_norm((quotient / divisor).masked_fill_(divisor == 0, 0).mul_(scale))


def score_noise(layer: LayerTrace, s: Tensor, r_q: Tensor) -> Tensor:
    """Squared error of R_q, and as much of R_k, from the divisions by q . k, (B,), over the queries with the largest R_q."""
    rows = r_q.square().sum((1, 3)).topk(min(SAMPLED, s.shape[2]), dim=1).indices
    q, s, lse = (take_queries(t, rows) for t in (layer.q, s, layer.lse))
    noise = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for tile in query_tiles(q, layer.k, layer.v, lse, None, s, layer.key_mask, layer.scaling, layer.window, rows):
        spread = q[:, :, tile.rows].square() @ layer.k.square().transpose(2, 3)
        error = tile.relevance.double().div_(tile.dots.double().square()).mul_(spread).masked_fill_(tile.dots == 0, 0)
        noise += error.square_().sum((1, 2, 3)) * (SCORE_ERROR / 4)
    return noise


def nudge(x: Tensor) -> Tensor:
    """x (B, n, d) moved by about its rounding unit, by the same pattern every time, so that an example alone moves as in a batch."""
    token = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)[:, None]
    feature = torch.arange(x.shape[2], device=x.device, dtype=torch.float64)
    # sines of integers: zero mean, no period
    pattern = torch.sin(token * 977 + feature + 1) * 2**0.5
    return (x.double() * (1 + pattern * torch.finfo(x.dtype).eps)).to(x.dtype)


def distance(moved: Tensor, scores: Tensor, own: Tensor | None) -> Tensor:
    """Relative L2 distance (B,) of two results (B, ...); own (B,): index of the pooled token, whose entry is left out."""
    difference, size = moved - scores, scores
    if own is not None:
        difference, size = (t.scatter(1, own[:, None], 0) for t in (difference, size))
    return (squared_norm(difference) / squared_norm(size).clamp_min(TINY)).sqrt()

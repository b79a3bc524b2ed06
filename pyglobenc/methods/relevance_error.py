"""Relevance with its expected error, carried along the rules.

The error of every divisor is that of `forward_error`; a tensor of relevance carries its expected squared relative error, by element or
by token, in units of the rounding unit squared:

    division by b                     adds  var b / b^2
    shares w of a residual sum        e  ->  (1 - 2 w) e + sum w^2 e        a term that dominates the total is divided by itself
    sum of relevances R = sum R_k     sum R_k^2 e_k / R^2
    Linear rule                       a token's mean, weighted with R^2, for all its inputs

The row of a layer's map inherits the error of its queries, and moves the scores by that part of what it adds to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.hf import LayerTrace
from pyglobenc.methods.forward_error import SAMPLED, LayerError, projection_error, score_error
from pyglobenc.methods.weight_cache import WeightCache
from pyglobenc.reference.relevance_attention import query_tiles
from pyglobenc.reference.safe_division import GUARD
from pyglobenc.reference.token_norms import take_queries

TINY = 1e-30


@dataclass
class Relevance:
    """Relevance of a tensor (B, n, d) and its expected squared relative error, (B, n, d) or (B, n, 1), or None."""

    values: Tensor
    error: Tensor | None

    def to(self, device: torch.device) -> "Relevance":
        """The same on a device: the parts of a model may lie on several."""
        return Relevance(self.values.to(device), None if self.error is None else self.error.to(device))

    def squared_error(self) -> Tensor:
        """Squared error of the values, (B, n, d)."""
        return self.values.square() * self.error


def divided_error(divisor: Tensor, variance: Tensor) -> Tensor:
    """Squared relative error of a quotient from its divisor's, of the same shape."""
    return (variance / divisor.square().add_(GUARD**2)).masked_fill_(divisor == 0, 0)


def added_error(error: Tensor, z: Tensor, at_z: Tensor, branches: tuple[Tensor, Tensor] | None) -> Tensor:
    """Of both branches of a residual sum z, (B, n, d); branches: their relevance, None if it isn't rescaled to shares of a total."""
    error = divided_error(z, at_z) + error
    if branches is None:
        return error
    share = branches[0] + branches[1]
    share /= share.sum((1, 2), keepdim=True, dtype=torch.float64).to(share.dtype)
    common = (share.square() * error).sum((1, 2), keepdim=True)
    return share.mul_(-2).add_(1).mul_(error).add_(common).clamp_(min=0)


def cloned(parts: Sequence[Relevance], total: Tensor) -> Relevance:
    """The sum of relevances, with its error."""
    if any(part.error is None for part in parts):
        return Relevance(total, None)
    return Relevance(total, sum(part.squared_error() for part in parts) / total.square().clamp_(min=TINY))


def feature_mean(r: Relevance) -> Tensor | None:
    """Squared relative error of every token as a whole, (B, n, 1)."""
    if r.error is None or r.error.shape[-1] == 1:
        return r.error
    return r.squared_error().sum(-1, keepdim=True) / r.values.square().sum(-1, keepdim=True).clamp_(min=TINY)


def query_error(s: Relevance) -> tuple[Tensor, Tensor]:
    """Of s = R_o / o, (B, H, n, dh): its squared norm and squared relative error by query, (B, n)."""
    size = s.values.square()
    norm = size.sum((1, 3))
    return norm, size.mul_(s.error).sum((1, 3)) / norm.clamp(min=TINY)


def projected_error(layer: LayerTrace, errors: LayerError, s: Relevance, parts: Sequence[Tensor], weights: WeightCache) -> list[Tensor]:
    """Squared relative errors (B, n, 1) of R_q, R_k and R_v, parts (B, H, n, dh): of s, and for the queries with the largest R_q of
    the division by q . k."""
    norm, inherited = query_error(s)
    overall = ((norm * inherited).sum(1, keepdim=True) / norm.sum(1, keepdim=True).clamp(min=TINY)).expand_as(norm)
    sizes = [part.square().sum((1, 3)) for part in parts]
    rows = sizes[0].topk(min(SAMPLED, norm.shape[1]), dim=1).indices
    q, s_rows, lse = (take_queries(t, rows) for t in (layer.q, s.values, layer.lse))
    scores = score_error(layer, errors.read, rows, weights)
    own_q, own_k = torch.zeros_like(rows, dtype=norm.dtype), torch.zeros_like(norm)
    q_sq, k_sq = (t.square().sum(-1) / t.shape[-1] ** 0.5 for t in (q, layer.k))
    for tile in query_tiles(q, layer.k, layer.v, lse, None, s_rows, layer.key_mask, layer.scaling, layer.window, rows):
        moved = divided_error(tile.dots, scores[:, :, tile.rows]).add_(scores[:, :, tile.rows], alpha=layer.scaling**2)
        # squared error of u q k / 2, u = R_alpha / q.k
        moved *= (tile.relevance / (2 * tile.dots)).masked_fill_(tile.dots == 0, 0).square_()
        moved *= q_sq[:, :, tile.rows, None] * k_sq[:, :, None]
        own_q[:, tile.rows] = moved.sum((1, 3))
        own_k += moved.sum((1, 2))
    own_q = torch.zeros_like(norm).scatter_(1, rows, own_q)
    at_q, at_k = (own / size.clamp(min=TINY) for own, size in zip((own_q, own_k), sizes, strict=False))
    return [t.unsqueeze(-1) for t in (inherited + at_q, overall + at_k, overall)]


def map_row_error(
    layer: LayerTrace, errors: LayerError, grad: Tensor | None, s: Relevance, position: Tensor, weights: WeightCache
) -> tuple[Tensor, Tensor]:
    """Row `position` (B,) of a layer's map, and its squared error, (B, n) both."""
    rows = position[:, None]
    q, s_row, lse = (take_queries(t, rows) for t in (layer.q, s.values, layer.lse))
    at_s = s_row.square() * take_queries(s.error, rows)
    scores = score_error(layer, errors.read, rows, weights, softmax=True).mul_(layer.scaling**2)
    at_v = projection_error(layer.v, errors.read, layer.modules.value, weights)
    (tile,) = query_tiles(q, layer.k, layer.v, lse, None, s_row, layer.key_mask, layer.scaling, layer.window, rows)
    moved = at_s @ layer.v.square().transpose(2, 3) + s_row.square() @ at_v.transpose(2, 3)
    moved = moved * tile.alpha.square() / 4 + tile.relevance.square() * scores
    row = tile.relevance
    if grad is not None:
        gradient = take_queries(grad, rows) @ layer.v.transpose(2, 3)
        moved *= gradient.square()
        row = row * gradient
    return row.clamp(min=0).mean(1)[:, 0], moved.masked_fill(row <= 0, 0).sum(1)[:, 0] / row.shape[1] ** 2

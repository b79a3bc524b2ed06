"""Relevance with its expected error, carried along the rules.

The error of every divisor is that of `forward_error`; a tensor of relevance carries its expected squared error, or by token its expected
squared relative error, in units of the rounding unit squared:

    division by b                     adds  var b / b^2
    shares w of a residual sum        e  ->  (1 - 2 w) e + sum w^2 e        a term that dominates the total is divided by itself
    sum of relevances R = sum R_k     sum R_k^2 e_k / R^2
    Linear rule                       a token's mean, weighted with R^2, for all its inputs

The row of a layer's map inherits the error of its queries, and moves the scores by that part of what it adds to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyglobenc.hf import LayerTrace
from pyglobenc.methods.forward_error import SAMPLED, LayerError, row_norms, score_error
from pyglobenc.methods.rollout import stack_layers
from pyglobenc.methods.weight_cache import WeightCache
from pyglobenc.reference.safe_division import GUARD
from pyglobenc.reference.token_norms import take_queries

TINY = 1e-30


@dataclass
class Relevance:
    """Relevance of a tensor (B, n, d) and its expected error, in one of two ways, or None.

    Attributes:
        values: (B, n, d).
        relative: squared relative error, (B, n, d), or (B, n or 1, 1) of every token as a whole.
        squared: squared error, (B, n, d).
    """

    values: Tensor
    relative: Tensor | None = None
    squared: Tensor | None = None

    def to(self, device: torch.device) -> "Relevance":
        """The same on a device: the parts of a model may lie on several."""
        return Relevance(*(None if t is None else t.to(device) for t in (self.values, self.relative, self.squared)))

    def squared_error(self) -> Tensor | None:
        """Squared error of the values, (B, n, d)."""
        return self.squared if self.relative is None else self.values.square().mul_(self.relative)


@dataclass
class Quotient:
    """s = R_o / o and its expected error by query, or None.

    Attributes:
        values: (B, H, n, dh).
        relative: (B, n, 1), squared relative error of R_o.
        norm: (B, n), squared norm, TINY at least.
        moved: (B, n), squared error.
    """

    values: Tensor
    relative: Tensor | None = None
    norm: Tensor | None = None
    moved: Tensor | None = None


def added_error(r: Relevance, quotient: Tensor, branches: tuple[Tensor, Tensor] | None, weights: WeightCache) -> Tensor:
    """Squared relative error of both branches of a residual sum, (B, n, d).

    quotient: that of a division by the sum, (B, n, d); branches: their relevance, None if it isn't rescaled to shares of a total.
    """
    if r.squared is None:
        error = quotient + r.relative
    else:
        error = torch.addcdiv(quotient, r.squared, torch.addcmul(weights.number(TINY, r.values), r.values, r.values))
    if branches is None:
        return error
    share = branches[0] + branches[1]
    share /= share.sum((1, 2), keepdim=True, dtype=torch.float64).to(share.dtype)
    moved = share * error
    common = share.mul_(moved).sum((1, 2), keepdim=True)
    return error.sub_(moved, alpha=2).add_(common).clamp_(min=0)


def cloned(parts: Sequence[Relevance], total: Tensor) -> Relevance:
    """The sum of relevances, with its error; all but the first come with relative ones."""
    squared = parts[0].squared_error()
    if squared is not None:
        for part in parts[1:]:
            squared = torch.addcmul(squared, part.values.square(), part.relative)
    return Relevance(total, squared=squared)


def token_error(r: Relevance) -> Tensor | None:
    """Squared relative error of every token as a whole, (B, n or 1, 1)."""
    if r.squared is None and (r.relative is None or r.relative.shape[-1] == 1):
        return r.relative
    size = r.values.square()
    norm = size.sum(-1, keepdim=True).clamp_(min=TINY)
    squared = size.mul_(r.relative) if r.squared is None else r.squared
    return squared.sum(-1, keepdim=True).div_(norm)


def quotient_error(r_o: Relevance, s: Tensor, o: Tensor, at_o: Tensor, weights: WeightCache) -> Quotient:
    """s = R_o / o, (B, H, n, dh), with its error; at_o: squared error of o beside its own rounding, (B, H, 1, dh)."""
    size = s.square()
    norm = size.sum((1, 3)).clamp_(min=TINY)
    inherited = size.div_(torch.addcmul(weights.number(GUARD**2, o), o, o)).transpose(1, 2).flatten(2) @ at_o.flatten(1)[..., None]
    return Quotient(s, r_o.relative, norm, torch.addcmul(inherited[..., 0], norm, r_o.relative[..., 0] + 1))


def projected_error(layer: LayerTrace, errors: LayerError, s: Quotient, parts: Sequence[Tensor], weights: WeightCache) -> list[Tensor]:
    """Squared relative errors (B, n or 1, 1) of R_q, R_k and R_v, parts (B, H, n, dh): of s, and for the queries with the largest R_q of
    the division by q . k."""
    inherited = s.moved / s.norm
    overall = s.moved.sum(1, keepdim=True) / s.norm.sum(1, keepdim=True)
    norms = [torch.linalg.vector_norm(part, dim=(1, 3)) for part in parts[:2]]
    size_q, size_k = (torch.addcmul(weights.number(TINY, t), t, t) for t in norms)
    size_q, rows = size_q.topk(min(SAMPLED, size_q.shape[1]), dim=1)
    moved = _sampled_error(layer, errors, s, rows, weights)
    at_q = inherited.scatter_add_(1, rows, moved.sum((1, 3)).div_(size_q))
    at_k = torch.addcdiv(overall, moved.sum((1, 2)), size_k)
    return [t.unsqueeze(-1) for t in (at_q, at_k, overall)]


def _sampled_error(layer: LayerTrace, errors: LayerError, s: Quotient, rows: Tensor, weights: WeightCache) -> Tensor:
    """Squared error of u q k / 2, u = R_alpha / q.k, of queries `rows` (B, m), by pair and head: (B, H, m, n)."""
    q, s_rows = (take_queries(t, rows) for t in (layer.q, s.values))
    dots = q @ layer.k.transpose(2, 3)
    alpha = dots * layer.scaling
    if layer.key_mask is not None:
        alpha.masked_fill_(~layer.key_mask[:, None, None], float("-inf"))
    alpha = alpha.softmax(-1)
    scores = score_error(layer, q, rows, errors.read, layer.k.square(), weights)
    # R_alpha = alpha s.v / 2 times |q| |k|, a mean over the features that it is spread to
    s_rows *= torch.linalg.vector_norm(q, dim=-1, keepdim=True) * (0.25 * layer.scaling / q.shape[3] ** 0.5)
    moved = (s_rows @ layer.v.transpose(2, 3)).mul_(alpha).mul_(torch.linalg.vector_norm(layer.k, dim=-1)[:, :, None])
    # nothing is divided by a score of 0
    square = torch.nn.functional.threshold_(dots.square_(), GUARD**2, float("inf"))
    moved = moved.square_().div_(square)
    # of the division, and of the softmax before it
    return torch.addcdiv(moved, moved, square, value=layer.scaling**-2).mul_(scores)


@dataclass
class MapRow:
    """What one layer's map brought to the explained token's row.

    Attributes:
        layer, errors: the layer.
        s: values (B, H, 1, dh) of the token alone, errors of all tokens.
        grad: (B, H, 1, dh), of the token; None where the map isn't weighed with it.
        before, after: (B, n), the row; before None: the map's own row.
    """

    layer: LayerTrace
    errors: LayerError
    s: Quotient
    grad: Tensor | None
    before: Tensor | None
    after: Tensor


def map_row(
    layer: LayerTrace, errors: LayerError, grad: Tensor | None, s: Quotient, own: Tensor, before: Tensor | None, after: Tensor
) -> MapRow:
    """Keep of s and grad (B, H, n, dh) what `row_error` needs; own (B, 1): the token; before, after (B, 1, n)."""
    s_row, grad = (None if t is None else take_queries(t, own) for t in (s.values, grad))
    return MapRow(layer, errors, replace(s, values=s_row), grad, None if before is None else before[:, 0], after[:, 0])


def row_error(steps: Sequence[MapRow], position: Tensor, weights: WeightCache) -> Tensor:
    """Squared error of the row after all steps, position (B,), (B, n)."""
    own, moved = _map_row_errors(steps, position, weights)
    if steps[0].before is None:
        return moved[:, 0]
    before, after, norm, inherited = (
        stack_layers(t) for t in zip(*[(step.before, step.after, step.s.norm, step.s.moved) for step in steps], strict=True)
    )
    # the other rows' part has the error of the queries that it comes from
    here = position.to(before.device)[:, None, None].expand(-1, len(steps), 1)
    weight, others = before.gather(2, here), before.square().scatter_(2, here, 0)
    others = (others * inherited).sum(2, keepdim=True) / (others * norm).sum(2, keepdim=True).clamp_(min=TINY)
    rest = torch.addcmul(after - before, weight, own, value=-1).square_()
    return (moved * weight.square()).addcmul_(others, rest).sum(1)


def _map_row_errors(steps: Sequence[MapRow], position: Tensor, weights: WeightCache) -> tuple[Tensor, Tensor]:
    """The token's row of every layer's map, and its squared error, (B, L, n) both."""
    s, grad = (None if t[0] is None else stack_layers(t) for t in zip(*[(step.s.values, step.grad) for step in steps], strict=True))
    at_o, token, o = (stack_layers([getattr(step.errors, name) for step in steps]) for name in ("o", "token", "token_o"))
    relative, read = (stack_layers(t) for t in zip(*[(step.s.relative, step.errors.read) for step in steps], strict=True))
    relative = relative.gather(2, position.to(s.device)[:, None, None, None].expand(-1, len(steps), 1, 1))[:, :, None]
    (alpha, at_alpha), size = token.unbind(2), s.square()
    # of s, beside the values' own rounding
    at_s = torch.addcdiv(relative + 2, at_o, torch.addcmul(weights.number(GUARD**2, o), o, o)).mul_(size)
    rows = s if grad is None else torch.cat([s, grad], 3)
    products, errors, norms = [], [], []
    for index, step in enumerate(steps):
        v = step.layer.v.transpose(2, 3)
        products.append(rows[:, index].to(v.device) @ v)
        errors.append(at_s[:, index].to(v.device) @ v.square())
        norms.append(row_norms(step.layer, step.layer.modules.value, weights).to(s.device))
    products, moved = stack_layers(products), stack_layers(errors)
    moved.addcmul_((size * torch.stack(norms)).sum(-1, keepdim=True), read.transpose(2, 3)[:, :, None])
    relevance = products[..., :1, :]
    moved.mul_(alpha.square()).addcmul_(relevance.square(), at_alpha)
    row = alpha.mul_(relevance)
    if grad is not None:
        row *= products[..., 1:, :]
        moved *= products[..., 1:, :].square()
    moved = moved.masked_fill_(row <= 0, 0).sum((2, 3)).div_(4 * s.shape[2] ** 2)
    return row.clamp_(min=0).mean((2, 3)).div_(2), moved

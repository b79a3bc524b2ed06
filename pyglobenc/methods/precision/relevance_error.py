"""Expected rounding error of relevance, estimated in one pass by an observer of the relevance rules.

Errors are squared, in units of the squared rounding unit of the forward pass. They are added as if they were
independent. `forward_errors` goes up through the forward pass. Every operation adds the square of its output
and passes on the error of its input. A Linear passes it on by the mean norm of its rows, a LayerNorm by
gamma / std, and an activation where it is positive. Attention passes on the error of its values and scores:

    o = sum_j alpha_j v_j:    sum_j alpha_j^2 (var v_j + scaling^2 var(q . k_j) (v_j - o)^2)

`ObservedRules` goes down again, with the squared relative error e of the relevance R of every token:

    division by b                     e + var b / b^2
    shares w of a residual sum        (1 - 2 w) e + sum w^2 e
    sum of relevances R = sum R_k     sum R_k^2 e_k / R^2
    Linear rule                       the token's mean, weighted with R^2

A division adds at most 1 in absolute units, because a divisor that may be 0 loses its quotient and no more.
The shares of a residual sum have this form because a term that dominates the total is divided by itself. A
step of the rollout moves the scores by the error of what it adds to them. The error of s = R_o / o stands for
the rows of the map.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pyglobenc.backends.shared.rows import take_queries
from pyglobenc.backends.shared.safe_division import GUARD
from pyglobenc.hf import LayerTrace
from pyglobenc.methods.relevance.rules import Rules
from pyglobenc.methods.relevance.states import States

TINY = 1e-30
# The number of queries of an example that are taken as a sample of all of them.
SAMPLED = 16
# Every eighth row of a weight gives the mean norm of its rows to a few percent, in less time than all rows.
ROWS = 8
# A pair with a small q . k takes about this share of its query's |R_alpha|. It was fitted to random models.
SHARE = 1 / 8


@dataclass
class LayerError:
    """Squared errors of the divisors of a layer.

    Attributes:
        returned, attended: (B, n, d), relative errors of the residual sums after the MLP and the attention.
        o: (B, H, 1, dh), error of the attention output without its own rounding, mean over the tokens.
        qk: (B, n, H), error of a query's products with the keys, relative to |q| |k|.
    """

    returned: Tensor
    attended: Tensor
    o: Tensor
    qk: Tensor


def forward_errors(states: States) -> list[LayerError]:
    """Estimate the errors of every layer of a forward pass.

    Args:
        states: the states of a forward pass over a batch, whose layers hold x (B, n, d).

    Returns:
        One `LayerError` for each layer, first to last, with errors (B, n, d), (B, H, 1, dh) and (B, n, H).
    """
    errors, x = [], states.layers[0].x.square()
    for layer, above in zip(states.layers, [*states.layers[1:], None], strict=True):
        m, x = layer.modules, x.to(layer.x.device)
        hidden, mlp = states.input_output(m.mlp_output)
        y, _ = states.input_output(m.intermediate)
        merged, attended = states.input_output(m.output)
        read = _after_norm(x, layer, "attention_norm", states.input_output(m.query)[0]) if m.pre_norm else x
        o, qk = _attention_error(layer, read.mean(-1, keepdim=True))
        at_sum, attended_error = _after_sum(
            attended, layer.x, x, o.mean((1, 3))[..., None] + _mean_square(merged), m.output
        )
        at_y = _after_norm(at_sum, layer, "output_norm" if m.pre_norm else "attention_norm", y)
        active = (hidden > 0).mean(-1, keepdim=True, dtype=y.dtype)
        within = active * at_y.mean(-1, keepdim=True) * _row_norm(m.intermediate, y) + 2 * _mean_square(
            hidden
        )
        residual, error = (layer.x + attended, at_sum) if m.pre_norm else (y, at_y)
        x, returned_error = _after_sum(mlp, residual, error, within, m.mlp_output)
        errors.append(LayerError(returned_error, attended_error, o, qk))
        if above is not None and not m.pre_norm:
            x = _after_norm(x, layer, "output_norm", above.x.to(x.device))
    return errors


def _attention_error(layer: LayerTrace, read: Tensor) -> tuple[Tensor, Tensor]:
    """Return o and qk of `LayerError`.

    The squared error of the input of the query, key and value projections is read (B, n, 1).
    """
    m, read = layer.modules, read[:, None]
    at_q, at_k, at_v = (read * _row_norm(module, read) for module in (m.query, m.key, m.value))
    rows, hidden, share = _sample(layer)
    index = rows[:, None, :, None]
    q, o = (take_queries(t, rows) for t in (layer.q, layer.o))
    scores = (q @ layer.k.transpose(2, 3)).mul_(layer.scaling)
    alpha_sq = (
        (scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))).softmax(-1).square_()
    )
    # A part that all scores share doesn't change the softmax.
    k_sq = (layer.k - share @ layer.k).square_()
    moved = (q.square() @ k_sq.transpose(2, 3)).mul_(3)
    moved.addcmul_(at_q.gather(2, index), k_sq.sum(-1)[:, :, None])
    moved.addcmul_(q.square().sum(-1, keepdim=True), at_k.transpose(2, 3)).mul_(alpha_sq).mul_(
        layer.scaling**2
    )
    v_sq = layer.v.square()
    # This expands moved * (v - o)^2.
    spread = moved @ v_sq + moved.sum(-1, keepdim=True) * o.square() - 2 * o * (moved @ layer.v)
    at_o = spread.clamp_(min=0).mean(2, keepdim=True) + alpha_sq.mean(2, keepdim=True) @ (v_sq + at_v)
    size_q, size_k = layer.q.square().sum(-1), (share @ layer.k.square()).sum(-1)
    # The mean over the keys stands for each of them.
    qk = at_q[..., 0] / (size_q + TINY) + (share @ at_k)[..., 0] / (size_k + TINY) + 3 / layer.q.shape[3]
    return at_o, qk.transpose(1, 2)


def _sample(layer: LayerTrace) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return a sample of the queries, and which tokens are real.

    Returns:
        Rows (B, SAMPLED) are spread evenly over the real tokens. The mask (B, 1, 1, n) is True at padding, or
        it is None. The shares (B, 1, 1, n) are 1 / the number of real tokens at each of them.
    """
    x, mask = layer.x, layer.key_mask
    steps = torch.arange(SAMPLED, device=x.device)
    if mask is None:
        batch, n, _ = x.shape
        return (steps * n // SAMPLED).expand(batch, -1), None, x.new_full((batch, 1, 1, n), 1 / n)
    count = mask.sum(1, keepdim=True)
    real = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return (
        real.gather(1, steps * count // SAMPLED),
        ~mask[:, None, None],
        (mask / count).to(x.dtype)[:, None, None],
    )


def _after_sum(a: Tensor, b: Tensor, at_b: Tensor, read: Tensor, module: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return the error of a + b, (B, n, d), and the relative error of a division by it.

    A module whose input has the error read (B, n, 1) returned a. at_b is the error of b.
    """
    square = (a + b).square_().add_(GUARD**2)
    error = (square + at_b).addcmul_(a, a).add_(read * _row_norm(module, a))
    return error, error / square


def _after_norm(error: Tensor, layer: LayerTrace, norm: str, returned: Tensor) -> Tensor:
    """Return the error of a LayerNorm's output, (B, n, d), given that of its input and what it returned."""
    scale = (
        layer.norm_weight(norm).to(error.dtype).square()
        * layer.norms[norm].rstd.to(error.dtype).square()[..., None]
    )
    return returned.square().addcmul_(error, scale)


def _row_norm(module: nn.Linear, like: Tensor) -> Tensor:
    """Return the mean squared norm of a weight's rows, (), in the dtype and on the device of `like`."""
    rows = module.weight.detach()[::ROWS]
    return torch.linalg.vector_norm(rows, dtype=like.dtype).square().div(len(rows)).to(like.device)


def _mean_square(t: Tensor) -> Tensor:
    """Return the mean square of the features of every token, (B, n, 1)."""
    return t.square().mean(-1, keepdim=True)


def _size(t: Tensor) -> Tensor:
    """Return the squared norm of every token, (B, n, 1), at least TINY."""
    return t.square().sum(-1, keepdim=True).clamp_(min=TINY)


class ObservedRules:
    """Relevance rules that also compute how large the error of the relevance probably is.

    Args:
        rules: the rules that compute relevance.
        states: the states of the forward pass. Packed sequences are not supported.
    """

    def __init__(self, rules: Rules, states: States):
        self.rules = rules
        self.backend = rules.backend
        self._states = states
        self._unit = torch.finfo(states.forward_dtype).eps / 2
        errors = forward_errors(states)
        self._of_layer = {id(layer): error for layer, error in zip(states.layers, errors, strict=True)}
        # The errors of the residual sums, in the order in which relevance reaches these sums.
        self._sums: Iterator[Tensor] = (
            e for error in reversed(errors) for e in (error.returned, error.attended)
        )
        # The squared relative error (B, n, 1) of each tensor of relevance. Others have that of one rounding.
        self._errors = WeakIdKeyDictionary()
        self._row: tuple[Tensor, Tensor] | None = None  # the rollout's row and its squared error, (B, n)
        self._last: Tensor | None = None  # the relevance that was followed last

    def __getattr__(self, name: str) -> Any:
        """Return other rules unchanged: a head uses them, and its few divisions add little error."""
        return getattr(self.rules, name)

    def linear(self, r: Tensor, module: nn.Linear, given: Tensor, returned: Tensor) -> Tensor:
        return self._keep(self.rules.linear(r, module, given, returned), self._error(r))

    def add(self, r: Tensor, a: Tensor, b: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        branches = self.rules.add(r, a, b, cu_seqlens)
        divided = next(self._sums, None)
        # Below the layers is the sum with an image's position embeddings, which adds one rounding.
        error = self._error(r).to(a.device) + (1 if divided is None else self._bounded(divided))
        if self.rules.rescale:
            share = branches[0] + branches[1]
            share /= share.sum((1, 2), keepdim=True, dtype=torch.float64).to(share.dtype)
            moved = share * error
            error = (error - 2 * moved + (share * moved).sum((1, 2), keepdim=True)).clamp_(min=0)
        for branch in branches:
            self._keep(branch, (branch.square() * error).sum(-1, keepdim=True) / _size(branch))
        return branches

    def clone(self, parts: list[Tensor], x: Tensor) -> Tensor:
        return self._joined(parts, self.rules.clone(parts, x))

    def total(self, parts: list[Tensor]) -> Tensor:
        return self._joined(parts, self.rules.total(parts))

    def over_output(self, r_o: Tensor, layer: LayerTrace) -> Tensor:
        s = self.rules.over_output(r_o, layer)
        divided = self._bounded(self._of_layer[id(layer)].o / layer.o.square().add_(GUARD**2)).add_(1)
        size = s.square()
        added = divided.mul_(size).sum((1, 3)) / size.sum((1, 3)).clamp_(min=TINY)
        return self._keep(s, self._error(r_o) + added[..., None])

    def attention(
        self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor | None, normalize: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        parts, rolled = self.rules.attention(layer, grad_o, s, roll, normalize)
        if rolled is not None:
            self._step(s, roll, rolled)
        at_s, size, heads = self._error(s), _of_heads(s), s.shape[1]
        overall = (at_s * size).sum(1, keepdim=True) / size.sum(1, keepdim=True)
        # For one pair |R_q| = |R_alpha| |q| |k| / (2 q . k). Its size shows how small q . k is, compared with
        # |q| |k| / sqrt(dh).
        size_q = parts[0].unflatten(2, (heads, -1)).square().sum(-1)
        largest = (s * layer.o).abs().sum(-1).transpose(1, 2) * (SHARE / 4)
        divided = self._of_layer[id(layer)].qk * s.shape[3] * size_q / (largest.square() + TINY)
        moved = self._bounded(divided).mul_(size_q).sum(-1, keepdim=True)
        at_q = at_s + moved / _size(parts[0])
        at_k = overall + moved.sum(1, keepdim=True) / _size(parts[1]).sum(1, keepdim=True)
        for part, error in zip(parts, (at_q, at_k, overall), strict=True):
            self._keep(part, error)
        return parts, rolled

    def roll(
        self, layer: LayerTrace, grad_o: Tensor | None, s: Tensor, roll: Tensor, normalize: bool
    ) -> Tensor:
        rolled = self.rules.roll(layer, grad_o, s, roll, normalize)
        self._step(s, roll, rolled)
        return rolled

    def estimated_error(self) -> Tensor:
        """Return the expected relative L2 error (B,) of the last relevance that was followed.

        This is the rollout's row without the entry of the token that the head reads, or the relevance of a
        layer or of the input.
        """
        last, own = self._last, self._states.pooled_index(self._last.device)
        if self._row is not None:
            row, moved = (t if own is None else t.scatter(1, own.to(t.device), 0) for t in self._row)
            squared = moved.sum(1) / row.square().sum(1).clamp_(min=TINY)
        elif last.dim() == 4:
            squared = self._error(last).expand(-1, last.shape[2], 1)[..., 0]
            squared = squared.mean(1) if own is None else squared.gather(1, own)[:, 0]
        else:
            squared = (self._error(last) * _size(last)).sum((1, 2)) / last.sum(-1).square().sum(1).clamp_(
                min=TINY
            )
        return squared.sqrt().double() * self._unit

    def _step(self, s: Tensor, before: Tensor, after: Tensor) -> None:
        """Add the error of one rollout step to the error of the row.

        The row is (B, 1, n), before and after the step. What the layer's map added to it has the error of the
        queries that it comes from.
        """
        before, after = before[:, 0], after[:, 0]
        weight = before.square() * _of_heads(s)[..., 0]
        error = (weight * self._error(s)[..., 0]).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_(
            min=TINY
        )
        moved = (after - before).square() * error
        self._row = after, moved if self._row is None else moved + self._row[1].to(moved.device)

    def _joined(self, parts: list[Tensor], total: Tensor) -> Tensor:
        """Store the error of `total`, a sum of independent parts, and return it."""
        return self._keep(total, sum(self._error(part) * _size(part) for part in parts) / _size(total))

    def _bounded(self, squared: Tensor) -> Tensor:
        """Return the squared relative error of a quotient, given that of its divisor."""
        return squared / (1 + squared * self._unit**2)

    def _error(self, r: Tensor) -> Tensor:
        """Return the squared error (B, n, 1) of a tensor of relevance, or 1 if none was stored."""
        found = self._errors.get(r)
        return r.new_ones(1, 1, 1) if found is None else found

    def _keep(self, r: Tensor, error: Tensor) -> Tensor:
        """Store the squared error (B, n, 1) of a tensor of relevance, and return the tensor."""
        self._last, self._errors[r] = r, error
        return r


def _of_heads(s: Tensor) -> Tensor:
    """Return the squared norm of every token of s (B, H, n, dh), (B, n, 1), at least TINY."""
    return s.square().sum((1, 3)).clamp_(min=TINY)[..., None]

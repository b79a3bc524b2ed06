"""The head of transformer attribution: a chain of Linear modules from one logit down to the last layer's
output, verified.

The published rules cover Linear modules, functions of each entry alone (activations, dropout), layer norms,
and reading one token. A sum or mean over tokens is a Linear function with equal positive weights. Any other
head has no rule and is refused.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pyglobenc.common.deferred import may_look, require
from pyglobenc.hf.limits import not_finite
from pyglobenc.hf.weights import is_plain
from pyglobenc.methods.head import Call, HeadRecord, direction, equal_shares, rounding

SELECTED = "the head reads several tokens, which a graph isn't recorded for"


@dataclass
class LinearStep:
    """A Linear module with what it read and returned, each (B, 1, d) at the token read; below a sum over
    tokens (B, n, d).
    """

    module: nn.Linear
    given: Tensor
    returned: Tensor


@dataclass
class SumStep:
    """A sum over tokens: x (B, n, d), and weights (B, n), equal where a token is read and 0 elsewhere."""

    x: Tensor
    weights: Tensor


@dataclass
class Head:
    """The way from a logit down to the last layer's output.

    Attributes:
        steps: top down; the first is a Linear module.
        index: (B,) int64, the output of the first module that is the logit.
        contrast: (B,) int64, the output that is subtracted from it, or None.
        shares: (B, n), the share of each token in what is read; they sum to 1. Packed sequences are padded.
        position: (B,) int64, the token read; None of a sum over tokens.
    """

    steps: list[LinearStep | SumStep]
    index: Tensor
    contrast: Tensor | None
    shares: Tensor
    position: Tensor | None

    def to(self, dtype: torch.dtype) -> "Head":
        """The same with its tensors in a dtype, out of the graph."""
        steps = []
        for step in self.steps:
            tensors = {name: t.detach().to(dtype) for name, t in vars(step).items() if isinstance(t, Tensor)}
            steps.append(replace(step, **tensors))
        return replace(self, steps=steps, shares=self.shares.to(dtype))


class _Point(NamedTuple):
    """A tensor that carries the whole logit: its place in the graph, and the call that read or returned it;
    the last layer's: None.
    """

    t: Tensor
    edge: GradientEdge
    call: Call | None
    returned: bool


def follow_head(
    called: nn.Module, record: HeadRecord, logit: Tensor, contrast: bool, real: Tensor | None
) -> Head:
    """Find the chain from the explained logit down, and check that it is the whole head.

    Args:
        called: the model, or the user's module around it.
        record: of the forward pass; B examples.
        logit: (B,), or (B / 2,) of the first half of the examples.
        contrast: whether the logit is a difference of two.
        real: (B, n) bool, True for real tokens, or None.

    Raises:
        ValueError: the head has no relevance rule; the message says why.
    """
    return _Chain(called, record, logit).follow(contrast, real)


class _Chain:
    def __init__(self, called: nn.Module, record: HeadRecord, logit: Tensor):
        self.called = called
        self.names = {module: name for name, module in called.named_modules()}
        self.record, self.logit = record, logit
        self.checks: list[tuple[Tensor, str]] = []

    def follow(self, contrast: bool, real: Tensor | None) -> Head:
        points = self._points()
        first = next(
            (
                i
                for i, p in enumerate(points)
                if p.call and p.returned and isinstance(p.call.module, nn.Linear)
            ),
            None,
        )
        if first is None:
            raise _refusal(self._why_no_linear())
        upper = points[first]
        index, other, position = self._top(upper, contrast)
        weights: Tensor | None = None
        steps: list[LinearStep | SumStep] = []
        for lower in points[first + 1 :]:
            if upper.call is lower.call and upper.returned and isinstance(lower.call.module, nn.Linear):
                steps.append(self._linear(lower.call))
            elif upper.call is lower.call and upper.returned and isinstance(lower.call.module, nn.LayerNorm):
                self._check_norm(lower.call)
            elif upper.edge != lower.edge:
                where = f"between {self._name(lower)} and {self._name(upper)} it"
                if self._shape(upper.t) == "pooled" and self._shape(lower.t) == "tokens":
                    position, weights = self._pooled(upper, lower, where)
                    if weights is not None:
                        steps.append(SumStep(lower.t.detach(), weights))
                else:
                    self._check_entries(upper, lower, where)
            upper = lower
        top = self.record.top
        if position is None and weights is None:
            # one token is all there is
            position = torch.zeros(len(top), dtype=torch.long, device=top.device)
        if weights is None:
            shares = torch.zeros(top.shape[:2], dtype=top.dtype, device=top.device)
            shares.scatter_(1, position.to(top.device)[:, None], 1)
            steps = [LinearStep(s.module, _at(s.given, position), _at(s.returned, position)) for s in steps]
        else:
            shares = (weights > 0).to(top.dtype)
            shares /= shares.sum(1, keepdim=True)
            above = next(i for i, step in enumerate(steps) if isinstance(step, SumStep))
            steps[:above] = [
                LinearStep(s.module, _at(s.given, None), _at(s.returned, None)) for s in steps[:above]
            ]
        if real is not None:
            inside = ~((shares > 0) & ~real.to(shares.device)).any()
            self.checks.append(
                (inside, "it reads padding tokens; give texts of one length, or one at a time")
            )
        head = Head(steps, index, other, shares, position if weights is None else None)
        self._replay(head)
        self._require()
        return head

    def _points(self) -> list[_Point]:
        """The tensors that carry the whole logit, from the logit down to the last layer's output."""
        record, logit = self.record, self.logit
        why = record.way(logit)
        if why is not None:
            raise _refusal(why)
        points = []
        for call in reversed(record.calls):
            for t, edge, returned in (
                (call.returned, call.returned_edge, True),
                (call.given, call.given_edge, False),
            ):
                if self._shape(t) is not None and record.carries(logit, edge):
                    points.append(_Point(t, edge, call, returned))
        return [*points, _Point(record.top, get_gradient_edge(record.top), None, True)]

    def _why_no_linear(self) -> str:
        beside = [
            call
            for call in self.record.calls
            if isinstance(call.module, nn.Linear) and self.record.leads_to(self.logit, call)
        ]
        if len(beside) > 1:
            names = " and ".join(dict.fromkeys(self.names.get(call.module, "a Linear") for call in beside))
            return f"the logit is computed on several ways side by side, through {names}"
        return "no Linear module returns the logit"

    def _top(self, point: _Point, contrast: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Which output of the first Linear module the logit is, (B,), which is subtracted, and the token of a
        head on every token.
        """
        name, size = self._name(point), len(self.logit)
        (row,) = torch.autograd.grad(self.logit.sum(), point.edge, retain_graph=True)
        out, row, position = point.t.detach()[:size], row[:size], None
        if self._shape(out) == "tokens" and out.shape[1] > 1:
            count = (row != 0).any(-1).sum(1)
            self.checks.append(((count == 1).all(), f"the logit isn't one token's output of {name}"))
            position = (row != 0).any(-1).int().argmax(1)
            out, row = _at(out, position), _at(row, position)
        out, row = out.reshape(size, -1), row.reshape(size, -1)
        index, other = row.argmax(1), row.argmin(1) if contrast else None
        expected = torch.zeros_like(row).scatter_(1, index[:, None], 1)
        if contrast:
            expected.scatter_(1, other[:, None], -1)
        value, scale = (out * row).sum(1), (out * row).abs().sum(1)
        near = (value - self.logit.detach().to(out.device)).abs() <= rounding(out) * scale
        self.checks.append(
            (
                (row == expected).all() & near.all(),
                f"the logit isn't an output of {name}; is it scaled, or a probability?",
            )
        )
        repeat = len(self.record.top) // size
        return tuple(None if t is None else t.repeat(repeat) for t in (index, other, position))

    def _linear(self, call: Call) -> LinearStep:
        module = call.module
        if not is_plain(module.weight):
            raise _refusal(
                f"the weights of {self.names[module]} aren't a plain matrix; load the model unquantised"
            )
        if call.given._version != call.versions[0]:
            raise _refusal(f"the input of {self.names[module]} is changed in place afterwards")
        # accelerate may fetch it inside the call
        given, returned = call.given.detach().to(call.returned.device), call.returned.detach()
        if call.returned._version != call.versions[1]:
            # an activation in place has replaced it
            bias = None if module.bias is None else module.bias.detach().to(given.dtype)
            returned = F.linear(given, module.weight.detach().to(given.dtype), bias)
        return LinearStep(module, given, returned)

    def _check_norm(self, call: Call) -> None:
        norm, given = call.module, call.given.detach()
        if norm.normalized_shape != given.shape[-1:]:
            raise _refusal(f"{self.names[norm]} normalises tokens together")
        if type(norm) is not nn.LayerNorm:
            returned = call.returned.detach()
            expected = nn.LayerNorm.forward(norm, given.to(returned.device))
            error = (expected - returned).abs().amax()
            bound = rounding(expected) * expected.abs().amax()
            self.checks.append((error <= bound, f"{self.names[norm]} is no layer norm"))

    def _check_entries(self, upper: _Point, lower: _Point, where: str) -> None:
        """Check that each entry of upper is a function of one entry of lower: the same two products with the
        Jacobian, scaled.
        """
        if upper.t.numel() != lower.t.numel():
            raise _refusal(f"{where} joins or reshapes tensors")
        seeds = [direction(upper.t, seed) for seed in (1, 2)]
        products = [
            torch.autograd.grad([upper.edge], [lower.edge], [seed], retain_graph=True)[0] for seed in seeds
        ]
        one, two = (
            product * seed.to(product.device).view_as(product)
            for product, seed in zip(products, reversed(seeds), strict=True)
        )
        what = f"{where} mixes features or tokens by something other than a Linear module or nn.LayerNorm"
        self._equal(one, two, rounding(upper.t, lower.t), what)

    def _pooled(self, upper: _Point, lower: _Point, where: str) -> tuple[Tensor | None, Tensor | None]:
        """The token (B,) whose entries upper is a function of; or, of a sum over tokens, None and the tokens'
        weights, (B, n).
        """
        batch, _, d = lower.t.shape
        if upper.t.numel() != batch * d:
            raise _refusal(f"{where} joins or reshapes tensors")
        seeds = [direction(upper.t, seed).view(batch, 1, d) for seed in (1, 2)]
        products = [
            torch.autograd.grad([upper.edge], [lower.edge], [seed.view(upper.t.shape)], retain_graph=True)[0]
            for seed in seeds
        ]
        read = (products[0] != 0).any(-1)
        count = read.sum(1)
        seeds = [seed.to(read.device) for seed in seeds]
        if not may_look():
            self.checks.append(((count == 1).all(), SELECTED))
        elif bool((count == 0).any()):
            raise _refusal(f"{where} passes no gradient on for this input")
        elif bool((count > 1).any()):
            size = seeds[0].square().sum((1, 2))
            weight = (products[0] * seeds[0]).sum((1, 2)) / (count * size)
            weights = weight[:, None] * read
            what = f"{where} reads several tokens in another way than their sum or mean"
            self._equal(products[0], weights[..., None] * seeds[0], rounding(upper.t, lower.t), what)
            terms = weights[..., None] * lower.t.detach()
            error = (terms.sum(1) - upper.t.detach().to(terms.device).view(batch, d)).abs()
            near = (error <= rounding(upper.t, lower.t) * terms.abs().sum(1)).all()
            self.checks.append(((weight > 0).all() & near & equal_shares(products[0], read, count), what))
            return None, weights
        one, two = (product * seed for product, seed in zip(products, reversed(seeds), strict=True))
        what = f"{where} mixes features by something other than a Linear module or nn.LayerNorm"
        self._equal(one, two, rounding(upper.t, lower.t), what)
        return read.int().argmax(1), None

    def _replay(self, head: Head) -> None:
        """Check that every Linear module returned x W^T + b, of the first one the logit."""
        for number, step in enumerate(head.steps):
            if isinstance(step, SumStep):
                continue
            module, returned = step.module, step.returned
            dtype = torch.promote_types(step.given.dtype, torch.float32)
            x, weight = step.given.to(dtype), module.weight.detach()
            bias = torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach()
            if number == 0:
                # a vocabulary has too many rows for all of them
                rows = head.index.to(weight.device)
                returned = returned.reshape(len(rows), -1).gather(1, rows[:, None].to(returned.device))
                terms, bias = x.reshape(len(rows), -1) * weight[rows].to(dtype), bias[rows].to(dtype)[:, None]
                expected, scale = (
                    terms.sum(1, keepdim=True) + bias,
                    terms.abs().sum(1, keepdim=True) + bias.abs(),
                )
            else:
                weight, bias = weight.to(dtype), bias.to(dtype)
                expected, scale = F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), bias.abs())
            near = (expected - returned).abs() <= rounding(returned, step.given) * scale
            self.checks.append(
                (near.all(), f"{self.names[module]} doesn't return its input times its weight")
            )

    def _equal(self, one: Tensor, two: Tensor, relative: float, message: str) -> None:
        """Both are one product of a few factors: they differ by roundings of the larger entries."""
        bound = relative * torch.maximum(one.abs(), two.abs()).amax(-1, keepdim=True)
        self.checks.append((((one - two).abs() <= bound).all(), message))

    def _require(self) -> None:
        """Raise the first message whose condition doesn't hold, with one wait for the device."""
        device = self.logit.device
        holds = torch.stack([condition.to(device) for condition, _ in self.checks])

        def error() -> ValueError:
            if not bool(torch.isfinite(self.logit).all()):
                return not_finite("TransformerAttribution", self.called)
            return _refusal(
                next(
                    message
                    for (_, message), fine in zip(self.checks, holds.tolist(), strict=True)
                    if not fine
                )
            )

        require(holds.all(), error)

    def _shape(self, t: Tensor) -> str | None:
        """What a tensor holds a vector of: every one of the "tokens", or every example ("pooled")."""
        top = self.record.top
        if self.record.of_tokens(t):
            return "tokens"
        return (
            "pooled" if t.dim() > 1 and len(t) == len(top) and t.numel() == len(top) * t.shape[-1] else None
        )

    def _name(self, point: _Point) -> str:
        return (
            "the last layer"
            if point.call is None
            else self.names.get(point.call.module, type(point.call.module).__name__)
        )


def _refusal(reason: str) -> ValueError:
    return ValueError(f"TransformerAttribution: the head has no relevance rule: {reason}")


def _at(t: Tensor, position: Tensor | None) -> Tensor:
    """The token `position` (B,) of t (B, n, d), (B, 1, d); a t of one vector for each example holds it
    already.
    """
    if t.dim() == 2 or t.shape[1] == 1:
        return t.reshape(len(t), 1, -1)
    return t[torch.arange(len(t), device=t.device), position.to(t.device)][:, None]

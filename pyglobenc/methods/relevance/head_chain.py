"""Find and check the head: the chain of Linear modules from one logit down to the last layer's output.

The published relevance rules cover Linear modules, elementwise functions (activations, dropout), layer norms,
and the selection of one token. A sum or mean over tokens is a Linear function with equal positive weights.
Any other head has no rule and is refused.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pyglobenc.common.deferred import may_look, require
from pyglobenc.hf.limits import not_finite
from pyglobenc.hf.weights import is_plain
from pyglobenc.methods.head import Call, HeadRecord, direction, equal_shares, rounding

SELECTED = "the head reads several tokens, and no CUDA graph can be recorded for such a head"


@dataclass
class LinearStep:
    """A Linear module of the head with its input and its output.

    Both are (B, 1, d) at the token that the head reads. Below a sum over tokens they are (B, n, d).
    """

    module: nn.Linear
    given: Tensor
    returned: Tensor


@dataclass
class SumStep:
    """A sum over tokens x (B, n, d), with weights (B, n): equal for the tokens read, 0 for the others."""

    x: Tensor
    weights: Tensor


@dataclass
class Head:
    """The steps from a logit down to the last layer's output.

    Attributes:
        steps: the steps from the top down; the first one is a Linear module.
        index: (B,) int64, the output of the first module that is the logit.
        contrast: (B,) int64, the output that is subtracted from the logit, or None.
        shares: (B, n), the share of each token in what the head reads. The shares of an example sum to 1.
            For packed sequences B is their number S, and n is the length of the longest one.
        position: (B,) int64, the token that the head reads; None if it reads a sum over tokens.
        norms: the layer norms between the steps.
    """

    steps: list[LinearStep | SumStep]
    index: Tensor
    contrast: Tensor | None
    shares: Tensor
    position: Tensor | None
    norms: list[nn.LayerNorm] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> "Head":
        """Return a copy whose tensors are detached and in the given dtype."""
        steps = []
        for step in self.steps:
            tensors = {name: t.detach().to(dtype) for name, t in vars(step).items() if isinstance(t, Tensor)}
            steps.append(replace(step, **tensors))
        return replace(self, steps=steps, shares=self.shares.to(dtype))


class _Point(NamedTuple):
    """A tensor through which the whole logit is computed.

    It has its place in the graph, the module call that read or returned it, and whether that call returned
    it. The last layer's output has call None.
    """

    t: Tensor
    edge: GradientEdge
    call: Call | None
    returned: bool


def follow_head(
    called: nn.Module,
    record: HeadRecord,
    logit: Tensor,
    contrast: bool,
    real: Tensor | None,
    who: str = "TransformerAttribution",
) -> Head:
    """Find the chain of modules below the explained logit, and check that it is the whole head.

    Args:
        called: the model, or the user's module around it.
        record: the head's module calls in the forward pass of B examples.
        logit: (B,), the explained value of each example, or (B / 2,) if the second half repeats the first.
        contrast: True if the logit is the difference of two logits.
        real: (B, n) bool, True for real tokens, or None if all tokens are real.
        who: name of the method for errors.

    Returns:
        The head, with its tensors still in the autograd graph.

    Raises:
        ValueError: the head has no relevance rule. The message gives the reason.
    """
    return _Chain(who, called, record, logit).follow(contrast, real)


class _Chain:
    def __init__(self, who: str, called: nn.Module, record: HeadRecord, logit: Tensor):
        self.who, self.called = who, called
        self.names = {module: name for name, module in called.named_modules()}
        self.record, self.logit = record, logit
        self.checks: list[tuple[Tensor, str]] = []
        self.norms: list[nn.LayerNorm] = []

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
            raise self._refusal(self._why_no_linear())
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
            # Each example has one token only, so the head reads that one.
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
        head = Head(steps, index, other, shares, position if weights is None else None, self.norms)
        self._replay(head)
        self._require()
        return head

    def _points(self) -> list[_Point]:
        """Return the tensors through which the whole logit is computed, from the top down."""
        record, logit = self.record, self.logit
        why = record.way(logit)
        if why is not None:
            raise self._refusal(why)
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
            return f"the logit is computed through several Linear modules in parallel, {names}"
        return "no Linear module returns the logit"

    def _top(self, point: _Point, contrast: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Find the outputs of the first Linear module that make up the logit.

        Returns the index of the explained output (B,), the index of the subtracted output (B,) or None, and
        the token (B,) if the head has outputs for every token, else None.
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
            raise self._refusal(
                f"the weights of {self.names[module]} aren't a plain matrix; load the model unquantised"
            )
        if call.given._version != call.versions[0]:
            raise self._refusal(f"the input of {self.names[module]} is changed in place after the call")
        # accelerate may move the input to the module's device inside the call.
        given, returned = call.given.detach().to(call.returned.device), call.returned.detach()
        if call.returned._version != call.versions[1]:
            # An activation function has overwritten the output in place, so compute it again.
            bias = None if module.bias is None else module.bias.detach().to(given.dtype)
            returned = F.linear(given, module.weight.detach().to(given.dtype), bias)
        return LinearStep(module, given, returned)

    def _check_norm(self, call: Call) -> None:
        norm, given = call.module, call.given.detach()
        self.norms.append(norm)
        if norm.normalized_shape != given.shape[-1:]:
            raise self._refusal(f"{self.names[norm]} normalises tokens together")
        if type(norm) is not nn.LayerNorm:
            returned = call.returned.detach()
            expected = nn.LayerNorm.forward(norm, given.to(returned.device))
            error = (expected - returned).abs().amax()
            bound = rounding(expected) * expected.abs().amax()
            self.checks.append((error <= bound, f"{self.names[norm]} does not compute a layer norm"))

    def _check_entries(self, upper: _Point, lower: _Point, where: str) -> None:
        """Check that each entry of upper is a function of the same entry of lower.

        Then the Jacobian J is diagonal. For two random vectors s and t, this means s * (J^T t) = t * (J^T s).
        """
        if upper.t.numel() != lower.t.numel():
            raise self._refusal(f"{where} joins or reshapes tensors")
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
        """Find the tokens of lower that upper (one vector for each example) reads.

        Returns the token (B,) and None if upper is an elementwise function of one token, or None and the
        tokens' weights (B, n) if upper is a sum over tokens.
        """
        batch, _, d = lower.t.shape
        if upper.t.numel() != batch * d:
            raise self._refusal(f"{where} joins or reshapes tensors")
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
            raise self._refusal(f"{where} has no gradient for this input")
        elif bool((count > 1).any()):
            size = seeds[0].square().sum((1, 2))
            weight = (products[0] * seeds[0]).sum((1, 2)) / (count * size)
            weights = weight[:, None] * read
            what = f"{where} reads several tokens, but neither their sum nor their mean"
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
        """Check that each Linear module returned x W^T + b; of the first module, check only the logit."""
        for number, step in enumerate(head.steps):
            if isinstance(step, SumStep):
                continue
            module, returned = step.module, step.returned
            dtype = torch.promote_types(step.given.dtype, torch.float32)
            x, weight = step.given.to(dtype), module.weight.detach()
            bias = torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach()
            if number == 0:
                # The first module may have a whole vocabulary of outputs. Only the explained one is checked.
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
        """Check that two tensors are equal up to rounding, relative to the largest entry of each row."""
        bound = relative * torch.maximum(one.abs(), two.abs()).amax(-1, keepdim=True)
        self.checks.append((((one - two).abs() <= bound).all(), message))

    def _require(self) -> None:
        """Raise the message of the first check that failed. All checks share one wait for the device."""
        device = self.logit.device
        holds = torch.stack([condition.to(device) for condition, _ in self.checks])

        def error() -> ValueError:
            if not bool(torch.isfinite(self.logit).all()):
                return not_finite(self.who, self.called)
            return self._refusal(
                next(
                    message
                    for (_, message), fine in zip(self.checks, holds.tolist(), strict=True)
                    if not fine
                )
            )

        require(holds.all(), error)

    def _shape(self, t: Tensor) -> str | None:
        """Return "tokens" if t has a vector for each token, "pooled" if one for each example, else None."""
        top = self.record.top
        if self.record.of_tokens(t):
            return "tokens"
        return (
            "pooled" if t.dim() > 1 and len(t) == len(top) and t.numel() == len(top) * t.shape[-1] else None
        )

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"{self.who}: the head has no relevance rule: {reason}")

    def _name(self, point: _Point) -> str:
        return (
            "the last layer"
            if point.call is None
            else self.names.get(point.call.module, type(point.call.module).__name__)
        )


def _at(t: Tensor, position: Tensor | None) -> Tensor:
    """Return the vector of the token `position` (B,) in t (B, n, d), as (B, 1, d).

    A t that holds one vector for each example is only reshaped.
    """
    if t.dim() == 2 or t.shape[1] == 1:
        return t.reshape(len(t), 1, -1)
    return t[torch.arange(len(t), device=t.device), position.to(t.device)][:, None]

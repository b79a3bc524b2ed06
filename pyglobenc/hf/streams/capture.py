"""Runs a model of two streams once, and keeps the tensors of every attention.

Each call checks what the rules of relevance assume: every layer and every attention ran once, its output was
added to the residual, and a layer's output is the next layer's input. As in `pyglobenc.hf.trace.checks`, both
sides are projected on one fixed direction, and no tensor is kept for it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.common.deferred import require
from pyglobenc.hf.streams.modules import Attention, Point, StreamLayer, Streams
from pyglobenc.hf.streams.registry import find_streams
from pyglobenc.hf.trace.attention import NAME, Recorder, recording
from pyglobenc.hf.trace.checks import MARGIN, check_still, describe
from pyglobenc.hf.trace.layers import outside
from pyglobenc.hf.trace.projections import Directions, Projection, project
from pyglobenc.hf.trace.threads import attention_in_this_thread, in_this_thread, uncompiled
from pyglobenc.hf.weights import parameter


@dataclass
class AttentionTrace:
    """The tensors of one attention in the last forward pass, with n queries and m keys."""

    q: Tensor  # (B, H, n, dh)
    k: Tensor  # (B, Hkv, m, dh)
    v: Tensor  # (B, Hkv, m, dh)
    o: Tensor  # (B, H, n, dh)
    lse: Tensor  # (B, H, n)
    key_mask: Tensor | None  # (B, m) bool
    scaling: float
    window: tuple[int, int]
    score_mod: ScoreMod | None
    cu_seqlens: None


@dataclass
class StreamsTrace:
    """The tensors of a forward pass under `capture_streams`.

    Attributes:
        called: the model.
        streams: its modules.
        tops: the output of the last layer of the target and of the source, (B, n, d) each.
    """

    called: nn.Module
    streams: Streams
    tops: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.tops.clear()
        self.directions = Directions()
        self._attended: dict[nn.Module, AttentionTrace] = {}
        self._points: dict[Any, Projection] = {}
        self._shapes: dict[Any, tuple[int, ...]] = {}
        self._calls: list[nn.Module] = []

    def keep(self, name: Any, t: Tensor, weight: Tensor | None = None) -> None:
        """Keep the projection of a tensor (B, n, d). An MLP that works in pieces may call a norm again."""
        before, new = self._points.get(name), project(t, self.directions, length=True, weight=weight)
        self._points[name] = new if before is None else before.followed_by(new)

    def record(self, module: nn.Module, tensors: dict[str, Any]) -> None:
        """Keep the tensors of one call of an attention module."""
        self._calls.append(module)
        self._attended[module] = AttentionTrace(**tensors)
        self.keep((module, "attended"), tensors["o"].transpose(1, 2).flatten(2))

    def called_block(self, block: nn.Module) -> None:
        """Note a call of a layer."""
        self._calls.append(block)

    def of(self, attention: Attention | None) -> AttentionTrace | None:
        """Return the tensors of an attention."""
        return None if attention is None else self._attended[attention.module]

    def check(self) -> None:
        """Check that the model computed what the rules assume; see the module's docstring.

        Raises:
            RuntimeError: an attention module never called transformers' attention function.
            ValueError: a module was called several times, or computed something else.
        """
        layers = [layer for stream in (self.streams.target, self.streams.source) for layer in stream]
        attentions = [one for layer in layers for one in (layer.own, layer.cross) if one is not None]
        for module in (one.module for one in attentions):
            if module not in self._attended:
                raise RuntimeError(
                    f"capture: {describe(self.called, module)} never called the attention function; the "
                    "model ignores transformers' attention interface, or did not run this part"
                )
        for module in (*(layer.block for layer in layers), *(one.module for one in attentions)):
            if self._calls.count(module) != 1:
                raise ValueError(
                    f"capture: {describe(self.called, module)} was called {self._calls.count(module)} times "
                    "in one forward pass; the rules need one call"
                )
        for stream in (self.streams.target, self.streams.source):
            self._check_sums(stream)

    def _check_sums(self, stream: list[StreamLayer]) -> None:
        real, compared = self.of(stream[0].own).key_mask, []
        for layer in stream:
            for one in (layer.own, layer.cross):
                if one is not None:
                    added, x, total = (
                        self._points[at] for at in ((one.output, "added"), one.residual, one.total)
                    )
                    difference = total.product - x.product - added.product
                    compared.append((difference, (total, x), one.total.module))
                    given, o = (self._points[at] for at in ((one.output, "input"), (one.module, "attended")))
                    compared.append((given.product - o.product, (given, o), one.output))
        for below, above in zip(stream, stream[1:], strict=False):
            returned, given = self._points[below.block, "output"], self._points[above.block, "input"]
            compared.append((given.product - returned.product, (given, returned), above.block))
        holds = []
        for difference, sides, _ in compared:
            allowed = self._eps(*sides) * sum(side.length for side in sides)
            close = ~(difference.abs() > allowed)
            holds.append(close if real is None else close | ~real.to(close.device))
        every = torch.stack([one.all().to(holds[0].device) for one in holds])

        def error() -> ValueError:
            module = compared[int((~every).nonzero()[0])][2]
            return ValueError(
                f"capture: the input of {describe(self.called, module)} is not what the rules assume: the "
                "residual x + o W_O + b, the attention output o, or the layer's output below. An adapter, a "
                "hook or a replaced forward pass changes it"
            )

        require(every.all(), error)

    def _eps(self, *sides: Projection) -> float:
        """Return the relative rounding of a comparison: of the stored tensors, and of sums over d."""
        stored = max(side.eps for side in sides)
        summed = torch.finfo(sides[0].product.dtype).eps
        width = max(size for size, _, _ in self.directions)
        return MARGIN * (stored + width**0.5 * summed)


@contextmanager
def capture_streams(model: PreTrainedModel, leaves: bool = True) -> Iterator[StreamsTrace]:
    """Capture the forward passes of a model of two streams.

    The model runs torch's fused attention, as under `capture`. On exit, also after an exception, every hook
    is removed and the model has its own attention implementation again.

    Args:
        model: a model of a known architecture, in evaluation mode.
        leaves: the first layer's input of each stream starts the autograd graph, so that parameters that need
            no gradient do not end it. The model must then run with gradients enabled.

    Yields:
        StreamsTrace, filled by each forward pass. A new pass replaces the tensors of the last one.

    Raises:
        TypeError, ValueError: as `find_streams`, or dropout is active.
        RuntimeError: the model is being captured already.
    """
    streams = find_streams(model)
    check_still(model)
    trace = StreamsTrace(model, streams)
    layers = [*streams.target, *streams.source]
    recorders = {}
    for layer in layers:
        for one, cross in ((layer.own, False), (layer.cross, True)):
            if one is not None:
                recorders[one.module] = Recorder(_record(trace, one.module), cross=cross)
    with ExitStack() as stack:
        stack.enter_context(recording(recorders))
        handles: list[Any] = []
        stack.callback(lambda: [handle.remove() for handle in handles])
        handles += _hooks(model, trace, leaves)
        blocks = {layer.block for layer in layers}
        models = [part for part in outside(model, blocks) if isinstance(part, PreTrainedModel)]
        configs = [part.config for part in (*models, *recorders) if hasattr(part, "config")]
        stack.enter_context(attention_in_this_thread(configs, NAME))
        stack.enter_context(uncompiled())
        yield trace


def _record(trace: StreamsTrace, module: nn.Module):
    return lambda **tensors: trace.record(module, tensors)


def _hooks(model: nn.Module, trace: StreamsTrace, leaves: bool) -> Iterator[Any]:
    yield model.register_forward_pre_hook(in_this_thread(lambda module, args: trace.clear()))
    points: set[Point] = set()
    for name, stream in (("target", trace.streams.target), ("source", trace.streams.source)):
        for layer in stream:
            called = in_this_thread(lambda module, args: trace.called_block(module))
            yield layer.block.register_forward_pre_hook(called)
            points |= {Point(layer.block, "input"), Point(layer.block, "output")}
            for one in (layer.own, layer.cross):
                if one is not None:
                    points |= {one.residual, one.total, Point(one.output, "input")}
                    yield one.output.register_forward_hook(in_this_thread(_keep_added(trace, one)))
        if leaves:
            leaf = in_this_thread(_leaf)
            yield stream[0].block.register_forward_pre_hook(leaf, prepend=True, with_kwargs=True)
        yield stream[-1].block.register_forward_hook(in_this_thread(_keep_top(trace, name)))
    for point in points:
        keep = in_this_thread(_keep_point(trace, point))
        if point.side == "input":
            yield point.module.register_forward_pre_hook(keep, with_kwargs=True)
        else:
            yield point.module.register_forward_hook(keep)


def _leaf(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _keep_added(trace: StreamsTrace, one: Attention):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        trace.keep((module, "added"), output, None if one.scale is None else parameter(*one.scale))

    return hook


def _keep_top(trace: StreamsTrace, name: str):
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        trace.tops[name] = _first(output)

    return hook


def _keep_point(trace: StreamsTrace, point: Point):
    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        trace.keep(point, args[0] if args else next(iter(kwargs.values())))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        trace.keep(point, _first(output))

    return before if point.side == "input" else after

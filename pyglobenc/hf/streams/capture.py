"""Runs a model of two streams once, and keeps the tensors of every attention.

Each call checks what the rules of relevance assume: every layer and every attention ran once, its output was
added to the residual, and a layer's output is the next layer's input. As in `pyglobenc.hf.trace.checks`, both
sides are projected on one fixed direction, and no tensor is kept for it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyglobenc.backends.shared.score_mods import ScoreMod
from pyglobenc.common.deferred import require
from pyglobenc.hf.streams.modules import Attention, StreamLayer, Streams
from pyglobenc.hf.streams.registry import find_streams
from pyglobenc.hf.trace.attention import NAME, Recorder, recording
from pyglobenc.hf.trace.checks import MARGIN, check_still, describe
from pyglobenc.hf.trace.layers import outside
from pyglobenc.hf.trace.projections import Directions, Projection
from pyglobenc.hf.trace.threads import attention_in_this_thread, in_this_thread, uncompiled
from pyglobenc.hf.weights import parameter
from pyglobenc.ops.attention import attention


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
    score_mod: ScoreMod | None = None
    cu_seqlens: None = None
    # The attention output as W_O receives it, in the autograd graph: o, or (B, n, H * dh) for a module that
    # computes attention itself.
    graph: Tensor | None = None


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
        self._attended: dict[nn.Module, list[AttentionTrace]] = defaultdict(list)
        self._points: dict[tuple[nn.Module, str], list[Projection]] = defaultdict(list)

    def keep(self, module: nn.Module, side: str, t: Tensor, weight: Tensor | None = None) -> None:
        """Keep the projection of a module's tensor, (B, n, d) or (B, H, n, dh); each call adds one."""
        self._points[module, side].append(self.directions.project(t, length=True, weight=weight))

    def record(self, module: nn.Module, tensors: dict[str, Any]) -> None:
        """Keep the tensors of one call of an attention module."""
        self._attended[module].append(AttentionTrace(**{"graph": tensors["o"]} | tensors))
        self.keep(module, "attended", tensors["o"])

    def last(self, module: nn.Module) -> AttentionTrace:
        """Return the tensors of an attention module's last call."""
        return self._attended[module][-1]

    def of(self, attention: Attention) -> AttentionTrace:
        """Return the tensors of an attention."""
        return self._attended[attention.module][attention.call]

    def check(self) -> None:
        """Check that the model computed what the rules assume; see the module's docstring.

        Raises:
            RuntimeError: an attention module never called transformers' attention function.
            ValueError: a module was called several times, or computed something else.
        """
        attentions = [one for layer in self.streams.layers for one in layer.attentions]
        expected = Counter(one.module for one in attentions)
        for module, count in expected.items():
            if not self._attended[module]:
                raise RuntimeError(
                    f"capture: {describe(self.called, module)} never called the attention function; the "
                    "model ignores transformers' attention interface, or did not run this part"
                )
            self._check_calls(module, len(self._attended[module]), count)
        ends = {point for layer in self.streams.layers for point in (layer.start, layer.end)}
        for (module, side), count in Counter((point.module, point.side) for point in ends).items():
            self._check_calls(module, len(self._points[module, side]), count)
        for stream in (self.streams.target, self.streams.source):
            self._check_sums(stream)

    def _check_calls(self, module: nn.Module, count: int, expected: int) -> None:
        if count != expected:
            raise ValueError(
                f"capture: {describe(self.called, module)} was called {count} times in one forward pass; the "
                f"rules need {expected}"
            )

    def _at(self, module: nn.Module, side: str, call: int, home: torch.device) -> Projection:
        """Return a projection on the device `home`, since the layers may be on several devices."""
        one = self._points[module, side][call]
        return Projection(one.product.to(home), one.length.to(home))

    def _check_sums(self, stream: list[StreamLayer]) -> None:
        first = self.of(stream[0].own)
        real, home, compared = first.key_mask, first.q.device, []
        for one in (one for layer in stream for one in layer.attentions):
            added, given, o = (
                self._at(*at, one.call, home)
                for at in ((one.output, "added"), (one.output, "input"), (one.module, "attended"))
            )
            x, total = (self._at(*point, home) for point in (one.residual, one.total))
            compared.append((total.product - x.product - added.product, (total, x), 1, one.total.module))
            # The attention of a module that computes it itself is computed twice. A softmax of scores of size
            # s has an error of about s rounding units.
            twice = 1
            if one.own_scores is not None:
                twice = 1 + self.of(one).lse.abs().amax(1).nan_to_num(posinf=0).to(home)
            compared.append((given.product - o.product, (given, o), twice, one.output))
        for below, above in zip(stream, stream[1:], strict=False):
            returned, given = (self._at(*point, home) for point in (below.end, above.start))
            compared.append((given.product - returned.product, (given, returned), 1, above.start.module))
        holds = []
        for difference, sides, factor, _ in compared:
            allowed = self._eps(sides[0].product.dtype) * sum(side.length for side in sides) * factor
            close = ~(difference.abs() > allowed)
            holds.append(close if real is None else close | ~real)
        every = torch.stack([one.all() for one in holds])

        def error() -> ValueError:
            module = compared[int((~every).nonzero()[0])][3]
            return ValueError(
                f"capture: the input of {describe(self.called, module)} is not what the rules assume: the "
                "residual x + o W_O + b, the attention output o, or the layer's output below. An adapter, a "
                "hook or a replaced forward pass changes it"
            )

        require(every.all(), error)

    def _eps(self, dtype: torch.dtype) -> float:
        """Return the relative rounding of a comparison: of the stored tensors, and of sums over d."""
        width = max(size for size, _, _ in self.directions)
        return MARGIN * (self.directions.eps + width**0.5 * torch.finfo(dtype).eps)


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
    attentions = [(one, one is layer.cross) for layer in streams.layers for one in layer.attentions]
    recorders = {one.module: Recorder(_record(trace, one.module), cross=cross) for one, cross in attentions}
    with ExitStack() as stack:
        stack.enter_context(recording(recorders))
        handles: list[Any] = []
        stack.callback(lambda: [handle.remove() for handle in handles])
        handles += _hooks(model, trace, leaves)
        blocks = {layer.start.module for layer in streams.layers}
        models = [part for part in outside(model, blocks) if isinstance(part, PreTrainedModel)]
        configs = [part.config for part in (*models, *recorders) if hasattr(part, "config")]
        stack.enter_context(attention_in_this_thread(configs, NAME))
        stack.enter_context(uncompiled())
        yield trace


def _record(trace: StreamsTrace, module: nn.Module):
    return lambda **tensors: trace.record(module, tensors)


def _hooks(model: nn.Module, trace: StreamsTrace, leaves: bool) -> Iterator[Any]:
    yield model.register_forward_pre_hook(in_this_thread(lambda module, args: trace.clear()))
    if leaves:
        for stream in (trace.streams.target, trace.streams.source):
            leaf = in_this_thread(_leaf)
            yield stream[0].start.module.register_forward_pre_hook(leaf, prepend=True, with_kwargs=True)
    attentions = [one for layer in trace.streams.layers for one in layer.attentions]
    points = {point for layer in trace.streams.layers for point in (layer.start, layer.end)}
    points |= {point for one in attentions for point in (one.residual, one.total)}
    for module, side in {(point.module, point.side) for point in points}:
        keep = in_this_thread(_keep_point(trace, side))
        if side == "input":
            yield module.register_forward_pre_hook(keep, with_kwargs=True)
        else:
            yield module.register_forward_hook(keep)
    for one in {one.module: one for one in attentions}.values():
        yield one.output.register_forward_pre_hook(in_this_thread(_keep_given(trace, one)))
        yield one.output.register_forward_hook(in_this_thread(_keep_added(trace, one)))
        if one.own_scores is not None:
            yield from _own_hooks(trace, one)
    for name, stream in (("target", trace.streams.target), ("source", trace.streams.source)):
        yield stream[-1].end.module.register_forward_hook(in_this_thread(_keep_top(trace, name)))


def _own_hooks(trace: StreamsTrace, one: Attention) -> Iterator[Any]:
    """Yield hooks that record an attention module which computes attention itself."""
    projected: list[Tensor] = []
    arguments = signature(type(one.module).forward)
    yield one.module.register_forward_pre_hook(in_this_thread(lambda module, args: projected.clear()))
    for projection in one.projections:
        keep = in_this_thread(lambda module, args, output: projected.append(output))
        yield projection.register_forward_hook(keep)

    @torch.no_grad()
    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = arguments.bind(module, *args, **kwargs)
        given.apply_defaults()
        own = one.own_scores(module, given.arguments)
        heads = module.num_attention_heads
        q, k, v = (t.detach().unflatten(2, (heads, -1)).transpose(1, 2) for t in projected)
        settings = dict(key_mask=own.key_mask, scaling=own.scaling, score_mod=own.score_mod)
        o, lse = attention(q, k, v, **settings)
        trace.record(module, dict(q=q, k=k, v=v, o=o, lse=lse, window=(-1, -1), **settings))

    yield one.module.register_forward_hook(in_this_thread(record), with_kwargs=True)


def _leaf(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _keep_given(trace: StreamsTrace, one: Attention):
    def hook(module: nn.Module, args: tuple) -> None:
        trace.keep(module, "input", args[0])
        if one.own_scores is not None:
            trace.last(one.module).graph = args[0]

    return hook


def _keep_added(trace: StreamsTrace, one: Attention):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        trace.keep(module, "added", output, None if one.scale is None else parameter(*one.scale))

    return hook


def _keep_top(trace: StreamsTrace, name: str):
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        trace.tops[name] = _first(output)

    return hook


def _keep_point(trace: StreamsTrace, side: str):
    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        trace.keep(module, side, args[0] if args else next(iter(kwargs.values())))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        trace.keep(module, side, _first(output))

    return before if side == "input" else after

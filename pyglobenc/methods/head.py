"""Finds what a model's head reads, by following the logits back to the last layer's output.

The autograd graph of the head shows it, from the logits down to the last layer's output. No class or module
is trusted by its name. A tensor carries the whole logit if every path of the graph from the logits to the
last layer's output goes through it.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pyglobenc.backends.shared.launch import HALF
from pyglobenc.common.deferred import may_look, require
from pyglobenc.hf import Trace
from pyglobenc.hf.limits import not_finite
from pyglobenc.hf.trace.layers import outside
from pyglobenc.hf.trace.threads import in_this_thread

# Results of the same few operations differ by a few roundings, and results of other functions by far more.
# Half precision rounds once for each operation. More roundings than these would hide a real difference.
ROUNDINGS, HALF_ROUNDINGS = 64, 4
NOT_FOLLOWED = (
    "the logits can't be followed to the last layer's output; the head runs without gradients, "
    "or doesn't read it"
)


@dataclass
class Call:
    """One call of a module of the head, whose first input and output are part of the autograd graph.

    Attributes:
        module: the module.
        given, returned: its first input that needs a gradient, and its output.
        given_edge, returned_edge: their edges in the autograd graph when the call returned.
        versions: version counters of both when the call returned. An operation in place raises them.
    """

    module: nn.Module
    given: Tensor
    returned: Tensor
    given_edge: GradientEdge
    returned_edge: GradientEdge
    versions: tuple[int, int]


class HeadRecord:
    """Record of what a model does after its last layer, in one forward pass.

    Attributes:
        top: output of the last layer, (B, n, d). With packed sequences it is padded to (S, n, d). None before
            it is computed.
        calls: calls of the modules outside the layers, after `top` was computed.
    """

    def __init__(self, trace: Trace, leaf: bool):
        self.top: Tensor | None = None
        self.calls: list[Call] = []
        self._trace, self._leaf = trace, leaf
        self._waiting = sum(layer.block is trace.modules[-1].block for layer in trace.modules)
        self._flagged: list[Tensor] = []

    def layer_returned(self, output: Any) -> Any:
        """Take note of an output of the last layer's module, and return it for the head.

        Layers may share one module, so an earlier layer's output may come first.
        """
        self._waiting -= 1
        if self._waiting < 0:
            raise ValueError(
                "the model's layers ran more than once in one forward pass; explain one input at a time"
            )
        if self._waiting > 0:
            return output
        return (self.start(output[0]), *output[1:]) if isinstance(output, tuple) else self.start(output)

    def start(self, top: Tensor) -> Tensor:
        """Let the head begin at `top`, and return the tensor that it reads, of the same shape."""
        self.top, self.calls = top, []
        if self._leaf:
            for t in (top, *self._trace.inputs):
                # Inference tensors can't be part of an autograd graph.
                if not t.requires_grad and not t.is_inference():
                    self._flagged.append(t.requires_grad_())
            torch.set_grad_enabled(True)
        # The head gets a copy, since it may change the tensor in place.
        return top.clone()

    def keep(self, module: nn.Module, args: tuple, kwargs: dict, returned: Any) -> None:
        """Take note of one call of a module."""
        given = next(
            (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad), None
        )
        if (
            self.top is None
            or given is None
            or not isinstance(returned, Tensor)
            or not returned.requires_grad
        ):
            return
        edges, versions = (
            (get_gradient_edge(given), get_gradient_edge(returned)),
            (given._version, returned._version),
        )
        self.calls.append(Call(module, given, returned, *edges, versions))

    def release(self) -> None:
        """Remove the gradient flags that `start` set."""
        while self._flagged:
            self._flagged.pop().requires_grad_(False)

    def way(self, t: Tensor) -> str | None:
        """Return why t isn't computed from the last layer's output alone, or None if it is."""
        if self.top is None or not t.requires_grad or not self.top.requires_grad:
            return NOT_FOLLOWED
        top = get_gradient_edge(self.top).node
        nodes = _nodes(t, (top,))
        if any(get_gradient_edge(x).node in nodes for x in self._trace.inputs if x.requires_grad):
            return (
                "it reads earlier layers' outputs, not the last one's alone" if top in nodes else NOT_FOLLOWED
            )
        return None if top in nodes else NOT_FOLLOWED

    def carries(self, t: Tensor, edge: GradientEdge) -> bool:
        """Tell whether t depends on the last layer's output only through the tensor at `edge`."""
        top = get_gradient_edge(self.top).node
        return edge.node is top or top not in _nodes(t, (top, edge.node))

    @staticmethod
    def leads_to(t: Tensor, call: Call) -> bool:
        """Tell whether t is computed from the output of a call."""
        return call.returned_edge.node in _nodes(t, ())

    def of_tokens(self, t: Tensor) -> bool:
        """Tell whether a tensor of the head holds a vector for every token, (B, n, any)."""
        return t.dim() == 3 and t.shape[:2] == self.top.shape[:2]


def _nodes(t: Tensor, ends: Collection[Any]) -> set[Any]:
    """Return the graph nodes that t is computed through, without those below the nodes in `ends`."""
    waiting, seen = [get_gradient_edge(t).node], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node not in ends:
                waiting.extend(below for below, _ in node.next_functions)
    return seen


@contextmanager
def recorded_head(called: nn.Module, encoder: nn.Module, trace: Trace, leaf: bool) -> Iterator[HeadRecord]:
    """Context that records one forward pass of `called` from the last layer's output on.

    It is entered within `capture`. It yields a `HeadRecord`, whose `top` is (B, n, d). Its hooks are removed
    on exit.

    Args:
        called: the model, or the user's module around it.
        encoder: the transformers model in it.
        trace: the trace of `capture`.
        leaf: whether the layers run without gradients, so that the autograd graph starts at the last layer's
            output. Otherwise the caller decides which layers need gradients.
    """
    record, blocks = HeadRecord(trace, leaf), {layer.block for layer in trace.modules}
    handles = []
    if leaf:
        handles.append(
            encoder.register_forward_pre_hook(in_this_thread(lambda module, args: _without_gradients()))
        )
    hook = in_this_thread(lambda module, args, output: record.layer_returned(output))
    handles.append(trace.modules[-1].block.register_forward_hook(hook))
    keep = in_this_thread(record.keep)
    for module in outside(called, blocks):
        if not any(inner is not None for inner in module._modules.values()):
            handles.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        with torch.set_grad_enabled(True):
            yield record
    finally:
        for handle in handles:
            handle.remove()
        record.release()


def _without_gradients() -> None:
    torch.set_grad_enabled(False)


def find_logits(output: Any) -> Tensor | None:
    """Return the logits in the output of a model or a user's module, (B, C) or (B, n, C).

    The output may be the logits alone, or a dict or ModelOutput with "logits". Of a tuple the first tensor
    that isn't a scalar is taken. Logits (B,) are returned as (B, 1).

    Returns:
        The logits, or None if the output holds none.

    Raises:
        ValueError: a tuple holds several tensors that may be the logits.
    """
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list):
        tensors = [t for t in output if isinstance(t, Tensor) and t.dim() > 0]
        logits = tensors[0] if tensors else None
        if logits is not None and logits.dim() == 3 and any(t.dim() == 2 for t in tensors):
            raise ValueError(
                "the model returns a tuple of several tensors; return the logits alone, or as a dict's "
                "'logits'"
            )
    else:
        logits = output
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() not in (1, 2, 3):
        return None
    return logits[:, None] if logits.dim() == 1 else logits


def detached(output: Any) -> Any:
    """Return the output of a model without its autograd graph.

    Args:
        output: a tensor such as logits (B, C), or a mapping, tuple or list of tensors. A mapping is changed
            in place.

    Returns:
        The same containers with detached tensors of the same shapes.
    """
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        for name, value in output.items():
            output[name] = detached(value)
        return output
    return type(output)(detached(value) for value in output) if type(output) in (tuple, list) else output


def tokens_read(
    who: str,
    model: nn.Module,
    record: HeadRecord,
    logits: Tensor,
    key_mask: Tensor | None,
    advice: str = "; name the tokens: targets=[0], or targets='mean'",
) -> Tensor | None:
    """Find what a head reads of the last layer's output, if it returns one set of logits an example.

    Args:
        who: name of the method for errors.
        model, record: the model that ran, and the record of its forward pass.
        logits: (B, C).
        key_mask: (B, n) bool, True for real tokens, or None.
        advice: end of an error message, on what the user can do.

    Returns:
        The position of the one token that is read, (B, 1) int64. For a mean or sum of several tokens, the
        share of each token, (B, 1, n). None for the heads of transformers that read neither one token nor the
        mean of all tokens: for these the documented target is explained.

    Raises:
        ValueError: the head reads something else, or runs without gradients.
    """

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{who}: {reason}{advice}")

    why = record.way(logits)
    if why is not None:
        raise refuse(f"the default target is what the head reads, but {why}")
    # A weighted sum of all classes is followed. A single class may have no gradient, because an inactive
    # unit passes none on.
    logit = (
        logits * torch.linspace(0.5, 1.5, logits.shape[1], dtype=logits.dtype, device=logits.device)
    ).sum()
    (gradient,) = torch.autograd.grad(logit, record.top, retain_graph=True)
    read = (gradient != 0).any(-1)
    count = read.sum(1)
    require(torch.isfinite(gradient).all(), lambda: not_finite(who, model))
    if key_mask is not None:
        inside = ~(read & ~key_mask.to(read.device)).any()
        require(
            inside,
            lambda: refuse("the head reads padding tokens; give texts of one length, or one at a time"),
        )
    if not may_look():
        require(
            (count == 1).all(),
            lambda: refuse("the head doesn't read exactly one token, so no CUDA graph can be recorded"),
        )
    elif not bool((count == 1).all()):
        real = torch.ones_like(read) if key_mask is None else key_mask.to(read.device)
        even = bool((count > 0).all()) and _evenly(record, logit, gradient, read, count)
        if type(model).__module__.startswith("transformers.") and not (even and torch.equal(read, real)):
            return None
        if not even:
            changes = bool((count > 0).all())
            raise refuse(
                "the head reads several tokens in unequal shares"
                if changes
                else "the logits don't depend on the text for this input"
            )
        return (read / count[:, None].to(gradient.dtype))[:, None]
    return read.int().argmax(1, keepdim=True)


def _evenly(record: HeadRecord, logit: Tensor, gradient: Tensor, read: Tensor, count: Tensor) -> bool:
    """Tell whether a logit is computed from the sum of the tokens read (B, n).

    Modules of the head may first change each token alone.
    """
    for call in reversed(record.calls):
        if record.of_tokens(call.returned) and record.carries(logit, call.returned_edge):
            (gradient,) = torch.autograd.grad(logit, call.returned_edge, retain_graph=True)
            break
    return bool(equal_shares(gradient, read, count))


def rounding(*tensors: Tensor) -> float:
    """Return by how much two results of the same few operations may differ, relative to the largest entry.

    Args:
        tensors: tensors of any shapes, such as (B, n, d). The coarsest of their dtypes counts.
    """
    coarsest = max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.finfo(coarsest).eps * (HALF_ROUNDINGS if coarsest in HALF else ROUNDINGS)


def equal_shares(gradient: Tensor, read: Tensor, count: Tensor) -> Tensor:
    """Tell whether all tokens read have the same gradient, as the tokens of a mean or a sum have.

    Args:
        gradient: (B, n, d).
        read: (B, n) bool, True for the tokens that are read.
        count: (B,), how many tokens are read.

    Returns:
        () bool.
    """
    # Equal gradients round alike in half precision too. The mean is taken in float32 at least.
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    mean = (gradient * read[..., None]).sum(1, keepdim=True) / count[:, None, None]
    apart = ((gradient - mean) * read[..., None]).abs().amax((1, 2))
    return (apart <= rounding(gradient) * mean.abs().amax((1, 2))).all()


def direction(like: Tensor, seed: int = 1) -> Tensor:
    """Return numbers from 0.5 to 1.5 without a pattern.

    Args:
        like: a tensor of any shape, such as (B, n, d).
        seed: selects the numbers.

    Returns:
        A tensor of the shape, dtype and device of `like`.
    """
    steps = torch.arange(like.numel(), device=like.device, dtype=torch.float64)
    return (1 + 0.5 * torch.sin(steps * 977 + seed)).to(like.dtype).view(like.shape)

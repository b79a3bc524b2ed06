"""Runs a model with an autograd graph from the explained logit down to the first layer's input."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.packing import real_tokens
from pyglobenc.common.autocast import callers_autocast
from pyglobenc.common.deferred import may_look
from pyglobenc.hf import LayerModules, LayerTrace, Trace, capture, find_layers
from pyglobenc.hf.trace.checks import LINEAR, describe
from pyglobenc.hf.trace.threads import in_this_thread
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.arguments import run_model
from pyglobenc.methods.head import HeadRecord, find_logits, recorded_head
from pyglobenc.methods.inputs import graph_inputs
from pyglobenc.methods.packing import Packed, run_packed
from pyglobenc.methods.precision.float64_forward import WideParameters
from pyglobenc.methods.precision.reliability import nudge
from pyglobenc.methods.target import Index, Target, find_target, kept_positions, next_token_position

NORMS = ("attention_norm", "output_norm")
# Factors of gradients in float16.
SCALES = (2.0**12, 2.0**6, 1.0)


@dataclass
class Recorded:
    """One forward pass whose tensors are part of the autograd graph.

    Attributes:
        trace: the captured layers.
        record: what the model did after its last layer.
        output: the output of the model.
        attended: the attention output of each layer, as its output projection gets it, (B, n, H * dh), for
            layers that compute attention themselves. Their `o` is not part of the graph.
    """

    trace: Trace
    record: HeadRecord
    output: Any
    attended: dict[int, Tensor]


def doubled(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch, such as input_ids (B, n), with all its examples repeated after them."""
    main = batch.get(model.main_input_name)
    size = len(batch["inputs_embeds"] if main is None else main)
    return {
        name: torch.cat([value, value])
        if isinstance(value, Tensor) and value.dim() and len(value) == size
        else value
        for name, value in batch.items()
    }


def record_forward(
    who: str,
    model: nn.Module,
    batch: Mapping[str, Any] | Packed,
    modules: Iterable[nn.Module] = (),
    wide: bool = False,
    twice: bool = False,
) -> Recorded:
    """Run a model with the first layer's input as a leaf of the graph.

    The parameters get no gradient, and keep their flags. Call this with gradients enabled.

    Args:
        who: name of the method for errors.
        model: a known architecture, or the user's module around one, in evaluation mode.
        batch: the model's checked inputs, such as input_ids (B, n), or packed sequences.
        modules: further modules whose inputs and outputs the trace keeps.
        wide: run the forward pass of a narrower model in float64.
        twice: the second half of the batch, or of the packed sequences, is perturbed by a rounding unit in
            every layer.

    Returns:
        The tensors of the forward pass.

    Raises:
        ValueError: the model runs in inference mode.
    """
    stock, found = stock_model(model), find_layers(stock_model(model))
    cu_seqlens = batch.cu_seqlens if isinstance(batch, Packed) else None
    attended: dict[int, Tensor] = {}
    with ExitStack() as stack:
        trace = stack.enter_context(capture(stock, modules=modules, cu_seqlens=cu_seqlens))
        trace.twice = twice
        record = stack.enter_context(recorded_head(model, stock, trace, leaf=False))
        stack.enter_context(_changed(who, found, twice, cu_seqlens))
        for index, layer in enumerate(found):
            if layer.own_scores is not None:
                hook = in_this_thread(lambda module, args, index=index: attended.update({index: args[0]}))
                stack.callback(layer.output.register_forward_pre_hook(hook).remove)
        if wide and next(stock.parameters()).dtype != torch.float64:
            stack.enter_context(WideParameters(torch.float64))
        stack.enter_context(callers_autocast())
        if cu_seqlens is None:
            output = run_model(model, graph_inputs(batch))
            trace.ran_on(batch)
        else:
            output = run_packed(model, batch, record)
        return Recorded(trace, record, output, attended)


@contextmanager
def _changed(
    who: str, found: Sequence[LayerModules], twice: bool, cu_seqlens: Tensor | None
) -> Iterator[None]:
    """Context in which the first layer's input is a leaf of the graph, and the second run is perturbed."""

    axis, own = (0, None) if cu_seqlens is None else (1, cu_seqlens[: len(cu_seqlens) // 2 + 1])

    def moved(x: Tensor, place: int) -> Tensor:
        """Perturb the second run in place, outside the graph: it takes the gradients of the first one."""
        if twice:
            with torch.no_grad():
                second = x.narrow(axis, x.shape[axis] // 2, x.shape[axis] // 2)
                second.copy_(nudge(second, own, place))
        return x

    started = False

    def change(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal started
        if torch.is_inference_mode_enabled():
            raise ValueError(
                f"{who}: the model runs in torch.inference_mode, which has no gradients; use torch.no_grad"
            )
        # A user's module may run its encoder under torch.no_grad.
        torch.set_grad_enabled(True)
        x = args[0] if args else kwargs["hidden_states"]
        x = x if started else x.detach()
        x = moved(x.clone() if twice else x, places[module])
        x = x if started else x.requires_grad_()
        started = True
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def change_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # A Linear's output is new, so it needs no copy.
        return moved(output if isinstance(module, nn.Linear) else output.clone(), places[module])

    # The second run perturbs the layers' inputs and what their modules return. The first layer's input also
    # starts the graph.
    blocks = [m.block for m in found[: len(found) if twice else 1]]
    added = [getattr(m, part) for m in found for part in (*LINEAR, *NORMS)] if twice else []
    places = {module: place for place, module in enumerate([*blocks, *added])}
    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            handle = block.register_forward_pre_hook(in_this_thread(change), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        for module in added:
            stack.callback(module.register_forward_hook(in_this_thread(change_output), prepend=True).remove)
        yield


def recorded_target(
    who: str,
    run: Recorded,
    batch: Mapping[str, Any] | Packed,
    explained: tuple[Any, Index, Index],
) -> Target:
    """Find the logits that a call explains, as `find_target` does.

    Without a position, a causal model's logits of tokens are explained at the last real token.

    Args:
        who: name of the method for errors.
        run: what `record_forward` returned for the batch.
        batch: the model's inputs, such as input_ids (B, n), or packed sequences.
        explained: target, contrast and position of the user's call. A position (B, T) explains T logits.

    Returns:
        The explained logit of each example, (B,) or (B, T), with its class.

    Raises:
        TypeError, ValueError: as `find_target`, or the model returned the logits of some tokens alone.
    """
    target, contrast, position = explained
    logits, last, mask = find_logits(run.output), run.trace.layers[-1], real_keys(run)
    if position is None and logits is not None and logits.dim() == 3 and last.window[1] == 0:
        position = next_token_position(who, logits, last.q.shape[2], mask)
    kept = None if isinstance(batch, Packed) else kept_positions(batch, last.q.shape[2])
    return find_target(who, run.output, target, contrast, position, mask, kept, several=True)


def real_keys(run: Recorded) -> Tensor | None:
    """Return the real tokens of a recorded batch, (B, n) bool; None if all tokens are real.

    Of S packed sequences it returns (S, longest), the tokens of each sequence.
    """
    layer = run.trace.layers[0]
    return layer.key_mask if layer.cu_seqlens is None else real_tokens(layer.cu_seqlens)


def input_gradients(logit: Tensor, run: Recorded, keep: bool = False) -> list[Tensor]:
    """Return the gradient of the logits (B,) with respect to each layer's input, (B, n, d).

    `keep` keeps the graph for another backward pass.

    Raises:
        ValueError: the logit has no gradient at a layer, because the model cuts it off.
    """
    return _gradients(logit, run, [layer.x for layer in run.trace.layers], 0, keep)


def attention_gradients(logit: Tensor, run: Recorded, lowest: int, keep: bool = False) -> list[Tensor | None]:
    """Return the gradient of the logits (B,) with respect to each layer's attention output, (B, H, n, dh).

    Layers below `lowest` get None. `keep` keeps the graph for another backward pass.

    Raises:
        ValueError: the logit has no gradient at a layer, because the model cuts it off.
    """
    layers = run.trace.layers
    wanted = [run.attended.get(index, layers[index].o) for index in range(lowest, len(layers))]
    grads = _gradients(logit, run, wanted, lowest, keep)
    return [None] * min(lowest, len(layers)) + [
        by_head(grad, layer) for grad, layer in zip(grads, layers[lowest:], strict=True)
    ]


def _gradients(logit: Tensor, run: Recorded, wanted: list[Tensor], lowest: int, keep: bool) -> list[Tensor]:
    """Return the gradient with respect to one tensor of each layer from `lowest` on.

    The sum of the logits has the same gradients, because no example depends on another one. float16 has so
    few exponents that small gradients would vanish. They are therefore computed times the largest of some
    powers of 2 for which they stay finite, and returned in float32.
    """
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    half = logit.dtype == torch.float16 and may_look()
    if wanted and logit.requires_grad:
        total = logit.float().sum() if half else logit.sum()
        for scale in SCALES if half else SCALES[-1:]:
            more = scale != SCALES[-1]
            grads = torch.autograd.grad(total * scale, wanted, retain_graph=keep or more, allow_unused=True)
            if not more or all(grad is None or grad.isfinite().all() for grad in grads):
                break
        if half:
            grads = [None if grad is None else grad.float() / scale for grad in grads]
    if any(grad is None for grad in grads):
        index = lowest + next(i for i, grad in enumerate(grads) if grad is None)
        name = describe(run.trace.called, run.trace.layers[index].modules.block)
        raise ValueError(
            f"capture: the logit has no gradient at {name}; a module above it detaches its input"
        )
    return list(grads)


def by_head(grad: Tensor, layer: LayerTrace) -> Tensor:
    """Return a gradient (B, H, n, dh) or (B, n, H * dh) as (B, H, n, dh)."""
    return grad if grad.dim() == 4 else grad.unflatten(2, (layer.q.shape[1], -1)).transpose(1, 2)

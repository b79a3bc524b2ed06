"""Runs a whole attribution, with the forward pass, as one CUDA graph.

This pays for short inputs, whose kernels finish before the host has launched the next ones.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.common.deferred import Check, check_range, checks_put_off, look
from pyglobenc.hf.trace.layers import outside
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.relevance.transformer_attribution import RelevanceResult, TransformerAttribution
from pyglobenc.methods.rollout.baselines import Rollout
from pyglobenc.methods.rollout.globenc import GlobEnc
from pyglobenc.methods.rollout.rows import RolloutResult
from pyglobenc.methods.target_tokens import target_positions

# Calls before a graph is recorded. In these, kernels are compiled and libraries allocate their workspaces.
WARM_UPS = 3

# Arguments that select what is explained. They may be numbers, lists or tensors.
INDICES = ("targets", "target", "contrast", "position")


def graphed(method: GlobEnc | Rollout | TransformerAttribution, **example: Any) -> "Graphed":
    """Record a method's row mode on one batch as a CUDA graph, which is then replayed on other batches.

        options = dict(padding="max_length", max_length=64, return_tensors="pt")
        fast = graphed(globenc, **tokenizer(text, **options).to("cuda"), targets=[0])
        result = fast(**tokenizer(other, **options).to("cuda"), targets=[0])

    Args:
        method: a method whose model is on a GPU. The graph reads the weights at their addresses. So weights
            that are changed in place count, and weights that are moved are refused.
        example: a batch and options, as the method takes them, such as input_ids (B, n). If later batches are
            to hold padding, the example needs an attention_mask. If their targets are to change, it needs
            targets.

    Returns:
        Graphed, which is called like the method, with batches of the same shapes as the example. The options
        stay those of the example.

    Raises:
        TypeError, ValueError: as the method, or no graph can be recorded for the method, an option or the
            device.
    """
    if (
        not isinstance(method, GlobEnc | Rollout | TransformerAttribution)
        or getattr(method, "method", None) == "attention-flow"
    ):
        known = "GlobEnc, a Rollout other than attention-flow, or TransformerAttribution"
        raise TypeError(f"graphed: method must be {known}, got {type(method).__name__}")
    if isinstance(method, TransformerAttribution) and method.has_choices(example):
        raise TypeError("graphed: a graph can't record multiple choice; call the method itself")
    if example.get("maps"):
        raise ValueError("graphed: a graph records scores, no maps; call the method itself for maps")
    return Graphed(method, example)


class Graphed:
    """A recorded attribution, as `graphed` returns it."""

    def __init__(self, method: GlobEnc | Rollout | TransformerAttribution, example: dict[str, Any]):
        method(**example)
        self._inputs = {
            name: t.to(stock_model(method.model).device, copy=True) for name, t in _tensors(example).items()
        }
        options = {name: value for name, value in example.items() if name not in self._inputs}
        self._model, self._places = method.model, _places(method.model)
        self._replay, self._result, self._checks = _record(
            lambda: method(**self._inputs, **options), stock_model(method.model).device
        )

    @torch.no_grad()
    def __call__(self, **batch: Any) -> RolloutResult | RelevanceResult:
        """Attribute a batch of the same shapes as the example.

        Args:
            batch: tensors, and targets if the example had some, as the method takes them.

        Returns:
            The method's result, without its warnings. The next call overwrites its output and diagnostics.

        Raises:
            ValueError: as the method. The inputs or their shapes differ from those of the example. Weights
                were moved or replaced, or adapters merged or switched, since the graph was recorded. The
                scores are too large for float32; the method itself would have used float64 for them.
        """
        if _places(self._model) != self._places:
            raise ValueError(
                "graphed: the model's weights were moved, replaced or adapted since the graph was recorded; "
                "record another"
            )
        given = _tensors(batch)
        if given.keys() != self._inputs.keys() or len(given) < len(batch):
            raise ValueError(f"graphed: recorded with {', '.join(self._inputs)}, got {', '.join(batch)}")
        for name, t in self._inputs.items():
            if given[name].shape != t.shape or given[name].dtype != t.dtype:
                recorded, came = (
                    f"{tuple(t.shape)} {t.dtype}",
                    f"{tuple(given[name].shape)} {given[name].dtype}",
                )
                raise ValueError(f"graphed: {name} was recorded as {recorded}, got {came}")
        for name in INDICES:
            if name in given:
                # An index out of range would make the graph read outside its tensors.
                of = (
                    self._result.scores
                    if name in ("targets", "position")
                    else find_logits(self._result.output)
                )
                check_range("graphed", name, given[name], of.shape[-1])
        for name, t in self._inputs.items():
            t.copy_(given[name], non_blocking=True)
        self._replay()
        look(self._checks)
        tensors = {name: t.clone() for name, t in vars(self._result).items() if isinstance(t, Tensor)}
        return replace(self._result, **tensors)


def _places(model: nn.Module) -> list[Any]:
    """Return the addresses of the model's tensors, and which adapters are merged or in use."""
    out: list[Any] = []
    for module in outside(model, ()):
        out += [
            t.data_ptr()
            for own in (module._parameters, module._buffers)
            for t in own.values()
            if t is not None
        ]
        if "base_layer" in module._modules:
            out.append(
                str(
                    [
                        getattr(module, name, None)
                        for name in ("active_adapters", "merged", "disable_adapters")
                    ]
                )
            )
    return out


def _tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a batch.

    Inputs come first. Targets (B, T) and indices (B,) follow as int64, if they are given.
    """
    out = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name not in INDICES}
    size = len(next(iter(out.values()), ()))
    for name in INDICES:
        if batch.get(name) is not None and not isinstance(batch[name], str):
            index = torch.as_tensor(batch[name])
            out[name] = (
                target_positions("graphed", index, size)
                if name == "targets"
                else index.expand(size)
                if index.dim() == 0
                else index
            )
    return out


def _record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any, list[Check]]:
    """Record a call that waits for nothing.

    Returns:
        A function that replays it, what it returned, and the checks to make after each replay.
    """
    if device.type != "cuda":
        raise ValueError(f"graphed: a CUDA graph needs the model on a CUDA GPU, got {device}")
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), checks_put_off():
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # This stream belongs to this device, which torch's own stream need not. It is also the one that the
        # libraries have allocated their workspaces for.
        with torch.cuda.graph(graph, stream=aside), checks_put_off() as checks:
            result = run()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, result, checks

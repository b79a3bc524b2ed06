"""A whole attribution, forward pass included, as one CUDA graph: for short inputs, whose kernels are done
before the next is launched.
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
from pyglobenc.methods.inputs import target_positions
from pyglobenc.methods.relevance.transformer_attribution import RelevanceResult, TransformerAttribution
from pyglobenc.methods.rollout.baselines import Rollout
from pyglobenc.methods.rollout.globenc import GlobEnc
from pyglobenc.methods.rollout.rows import RolloutResult

# before a graph is recorded: kernels are compiled, libraries take their workspaces
WARM_UPS = 3

# arguments that say what is explained: numbers, lists or tensors
INDICES = ("targets", "target", "contrast", "position")


def graphed(method: GlobEnc | Rollout | TransformerAttribution, **example: Any) -> "Graphed":
    """Record a method's row mode on one batch as a CUDA graph, to be replayed on others of its shape.

        fast = graphed(globenc, **tokenizer(text, padding="max_length", max_length=64,
        return_tensors="pt").to("cuda"), targets=[0]) result = fast(**tokenizer(other, padding="max_length",
        max_length=64, return_tensors="pt").to("cuda"), targets=[0])

    Args:
        method: its model on a GPU. The graph reads the weights where they lay: those written there later
            count, others are refused.
        example: a batch, and options, as the method takes them. A batch that is to hold padding needs an
            attention_mask here too, and one whose targets are to change some targets.

    Returns:
        Graphed, which is called like the method, on batches of the example's shapes; options stay the
        example's.

    Raises:
        TypeError, ValueError: as the method, or a method, option or device that no graph can be recorded for.
    """
    if (
        not isinstance(method, GlobEnc | Rollout | TransformerAttribution)
        or getattr(method, "method", None) == "attention-flow"
    ):
        known = "GlobEnc, a Rollout but for the flow, or TransformerAttribution"
        raise TypeError(f"graphed: method must be {known}, got {type(method).__name__}")
    if isinstance(method, TransformerAttribution) and method.has_choices(example):
        raise TypeError("graphed: a choice is made among inputs before the model runs; ask the method itself")
    if example.get("maps"):
        raise ValueError("graphed: records scores, no maps; ask the method itself for them")
    return Graphed(method, example)


class Graphed:
    """What `graphed` returns."""

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
        """Attribute a batch of the example's shapes.

        Args:
            batch: tensors, and targets if the example had some, as the method takes them.

        Returns:
            The method's result, without its warnings. Its output and diagnostics are overwritten by the next
            call.

        Raises:
            ValueError: other inputs or shapes than the example's, or as the method; weights that were moved,
                replaced, or whose adapters were merged or switched since the graph was recorded; scores too
                large for float32, where the method itself would have gone on in float64.
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
                # the graph would read outside its tensors
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
    """Where the model's tensors lie, and which of its adapters are merged or in use."""
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
    """The tensors of a batch, its inputs first; targets (B, T) and indices (B,), if given, last, int64."""
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
    """Record a call that waits for nothing: what replays it, what it returned, and the checks to make after
    each replay.
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
        # a stream of this device, which torch's own need not be, and the one that libraries have their
        # workspaces for
        with torch.cuda.graph(graph, stream=aside), checks_put_off() as checks:
            result = run()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, result, checks

"""Methods by name, each called the same way: what `pyglobenc.explain` and the command line offer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pyglobenc.methods.head import find_logits
from pyglobenc.methods.relevance.transformer_attribution import TransformerAttribution
from pyglobenc.methods.relevance.variants import FOLLOWED, VARIANTS
from pyglobenc.methods.rollout import baselines as family
from pyglobenc.methods.rollout.globenc import GlobEnc


@dataclass(frozen=True)
class Rows:
    """One row of scores an example."""

    scores: Tensor  # (B, n), padding 0
    log_scale: Tensor  # (B,), the method's own value is scores * exp(log_scale)
    targets: Tensor | None  # (B,) int64, what was explained; None for a mean over tokens
    logits: Tensor | None  # (B, ...), None of a model without a head, or whose head wasn't run


# of a batch, or of lists to be packed, and targets (B,) int64: token positions, "mean", or classes; None is
# what the method itself takes
Run = Callable[[Mapping[str, Tensor], Tensor | str | None], Rows]


@dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes:
        name: what users call it.
        summary: one line, with the paper.
        build: called with model, backend and dtype as `GlobEnc` takes them; returns what computes the rows of
            a batch.
        target: "token" if targets are positions, "class" if they are classes of a sequence classifier.
        supports_packing: whether it also takes sequences packed into one.
    """

    name: str
    summary: str
    build: Callable[[PreTrainedModel, str, torch.dtype | None], Run]
    target: str = "token"
    supports_packing: bool = False


def _rollout(name: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
    """Any method that returns a `RolloutResult`."""
    attribute = (
        GlobEnc(model, backend, dtype) if name == "globenc" else family.Rollout(model, name, backend, dtype)
    )

    def run(batch: Mapping[str, Any], targets: Tensor | str | None) -> Rows:
        rows = targets[:, None] if isinstance(targets, Tensor) else targets
        if not isinstance(batch["input_ids"], Tensor):
            results = attribute.packed(**batch, targets=rows)
            scores = pad_sequence([one.scores[0, 0] for one in results], batch_first=True)
            explained = (
                None if results[0].targets is None else torch.cat([one.targets[:, 0] for one in results])
            )
            return Rows(
                scores,
                torch.cat([one.log_scale[0] for one in results]),
                explained,
                _logits([one.output for one in results]),
            )
        result = attribute(**batch, targets=rows)
        explained = None if result.targets is None else result.targets[:, 0]
        return Rows(result.scores[:, 0], result.log_scale[:, 0], explained, find_logits(result.output))

    return run


def _logits(outputs: Sequence[Any]) -> Tensor | None:
    """(S, classes) of what the model returned for each of S sequences, or None."""
    return None if outputs[0] is None else torch.cat([find_logits(output) for output in outputs])


def _relevance(variant: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
    """Any variant of `TransformerAttribution`."""
    attribute = TransformerAttribution(model, backend, dtype)

    def run(batch: Mapping[str, Any], targets: Tensor | None) -> Rows:
        if not isinstance(batch["input_ids"], Tensor):
            results = attribute.packed(**batch, target=targets, variant=variant)
            scores = pad_sequence([one.scores[0] for one in results], batch_first=True)
            classes = torch.cat([one.target for one in results])
            return Rows(
                scores, torch.zeros_like(scores[:, 0]), classes, _logits([one.output for one in results])
            )
        result = attribute(**batch, target=targets, variant=variant)
        return Rows(
            result.scores, torch.zeros_like(result.scores[:, 0]), result.target, find_logits(result.output)
        )

    return run


# name -> variant, summary; the last three as the paper's comparison computes them
RELEVANCE = {
    "transformer-attribution": (
        "transformer_attribution",
        "relevance times attention gradients, rolled out (Chefer et al., CVPR 2021)",
    ),
    "lrp": (
        "lrp",
        "layer-wise relevance of the input tokens, summed over the hidden size; signed (Binder et al., 2016)",
    ),
    "partial-lrp": (
        "lrp_last_layer",
        "layer-wise relevance of the last layer's attention (Voita et al., 2019)",
    ),
    "attention-gradcam": (
        "attn_gradcam",
        "Grad-CAM on the last layer's attention (after Selvaraju et al., 2017)",
    ),
}

METHODS = {
    name: Method(name, summary, partial(_rollout, name), supports_packing=name != "attention-flow")
    for name, summary in family.METHODS.items()
}
METHODS |= {
    name: Method(
        name,
        summary,
        partial(_relevance, variant),
        target="class",
        supports_packing=VARIANTS[variant].kind in FOLLOWED,
    )
    for name, (variant, summary) in RELEVANCE.items()
}


def find_method(name: str) -> Method:
    """The entry of that name.

    Raises:
        ValueError: no such method; the message lists them.
    """
    if name not in METHODS:
        raise ValueError(f"explain: method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]

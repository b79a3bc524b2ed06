"""Methods by name, each called the same way, for `pyglobenc.explain` and the command line."""

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
from pyglobenc.methods.rollout.baselines import ROLLOUTS, Rollout
from pyglobenc.methods.rollout.globenc import GlobEnc


@dataclass(frozen=True)
class Rows:
    """One row of scores for each example."""

    scores: Tensor  # (B, n), 0 at padding
    log_scale: Tensor  # (B,); the method's own value is scores * exp(log_scale)
    targets: Tensor | None  # (B,) int64, the targets explained; None for a mean over tokens
    logits: Tensor | None  # (B, ...); None without a head, or if the head wasn't run


# A call of a method. The first argument is a batch of tensors, or of lists that are packed. The second one is
# the targets, (B,) int64 token positions or classes, or "mean". None means the default of the method.
Run = Callable[[Mapping[str, Tensor], Tensor | str | None], Rows]


@dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes:
        name: the name that users give.
        summary: one line, with the paper.
        build: function of model, backend and dtype, as `GlobEnc` takes them. It returns a function that
            computes the `Rows` of a batch.
        target: "token" if targets are positions, "class" if they are classes of a sequence classifier.
        supports_packing: whether the method also takes packed sequences.
    """

    name: str
    summary: str
    build: Callable[[PreTrainedModel, str, torch.dtype | None], Run]
    target: str = "token"
    supports_packing: bool = False


def _rollout(name: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
    """Build a method that returns a `RolloutResult`."""
    attribute = GlobEnc(model, backend, dtype) if name == "globenc" else Rollout(model, name, backend, dtype)

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
    """Join the logits of S sequences, one output each, to (S, classes), or return None without logits."""
    return None if outputs[0] is None else torch.cat([find_logits(output) for output in outputs])


def _relevance(variant: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
    """Build a variant of `TransformerAttribution`."""
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


# Maps a name to its variant and summary. The last three are computed as in the paper's comparison.
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
    for name, summary in ROLLOUTS.items()
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
    """Return the method of this name.

    Raises:
        ValueError: there is no such method. The message lists those that there are.
    """
    if name not in METHODS:
        raise ValueError(f"explain: method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]

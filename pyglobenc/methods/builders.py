"""Builds each method as one function from a batch to `Rows`, for the registry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pyglobenc.hf.streams.registry import reads_a_source
from pyglobenc.hf.unwrap import called_module
from pyglobenc.methods.cross.attribution import CrossAttribution
from pyglobenc.methods.gradients.attribution import GradientAttribution
from pyglobenc.methods.gradients.gradient_rollout import GradientRollout
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.relevance.transformer_attribution import TransformerAttribution
from pyglobenc.methods.rollout.baselines import Rollout
from pyglobenc.methods.rollout.globenc import GlobEnc
from pyglobenc.methods.rollout.information_flow import InformationFlow


@dataclass(frozen=True)
class Rows:
    """One row of scores for each example, or T rows: all tensors then have T as their second dimension."""

    # (B, n), 0 at padding. Of images: the patches, with or without the special tokens before them, or
    # (B, height, width) if the method scores pixels.
    scores: Tensor
    log_scale: Tensor  # (B,); the method's own value is scores * exp(log_scale)
    targets: Tensor | None  # (B,) int64, the targets explained; None for a mean over tokens
    logits: Tensor | None  # (B, ...); None without a head, or if the head wasn't run
    error: Tensor | None = None  # (B,), as `RelevanceResult.error` of a batch; None if it isn't known
    nothing: Tensor | None = None  # (B,) bool, True where the method finds nothing and all scores are 0


# A call of a method. The first argument is a batch of tensors, or of lists that are packed. The second one is
# the targets, (B,) int64 token positions or classes, or "mean". None means the default of the method. A
# method that explains a class also takes contrast and position by name, each (B,) int64 or None. Targets
# (B, T), for classes with a position (B, T), are explained by one forward pass.
Run = Callable[..., Rows]


def rollout(name: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
    """Build a method that returns a `RolloutResult`."""
    attribute = GlobEnc(model, backend, dtype) if name == "globenc" else Rollout(model, name, backend, dtype)

    def run(batch: Mapping[str, Any], targets: Tensor | str | None) -> Rows:
        several = isinstance(targets, Tensor) and targets.dim() == 2
        rows = targets[:, None] if isinstance(targets, Tensor) and not several else targets
        if _is_packed(batch):
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
        row = slice(None) if several else 0
        explained = None if result.targets is None else result.targets[:, row]
        logits = find_logits(result.output)
        return Rows(result.scores[:, row], result.log_scale[:, row], explained, logits)

    return run


def information_flow(
    model: PreTrainedModel, backend: str = "auto", dtype: torch.dtype | None = None, **spans: Any
) -> Run:
    """Build `InformationFlow` to one token, to the mean of all tokens, or to a span.

    spans are target_span, which takes the place of the targets, reasoning_span and hops.
    """
    attribute = InformationFlow(model, backend, dtype)

    def run(batch: Mapping[str, Any], targets: Tensor | str | None) -> Rows:
        if isinstance(targets, Tensor) and targets.dim() == 2:
            rows = attribute.each(**batch, targets=targets)
            scores = torch.stack([row.scores for row in rows], 1)
            error = None if rows[0].error is None else torch.stack([row.error for row in rows], 1)
            none = torch.zeros_like(scores[..., 0])
            return Rows(scores, none, targets, find_logits(rows[0].output), error)
        span = torch.stack([targets, targets + 1], 1) if isinstance(targets, Tensor) else targets
        result = attribute(**batch, **{"target_span": span} | spans)
        explained = targets if isinstance(targets, Tensor) else result.targets
        none = torch.zeros_like(result.scores[:, 0])
        return Rows(result.scores, none, explained, find_logits(result.output), result.error)

    return run


def _is_packed(batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch holds lists of sequences to be packed, instead of tensors (B, n)."""
    return isinstance(batch.get("input_ids"), list)


def _logits(outputs: Sequence[Any]) -> Tensor | None:
    """Join the logits of S sequences, one output each, to (S, classes), or return None without logits."""
    return None if outputs[0] is None else torch.cat([find_logits(output) for output in outputs])


def relevance(
    variant: str,
    model: PreTrainedModel,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    start_layer: int = 0,
) -> Run:
    """Build a variant of `TransformerAttribution`; its `Rows` hold scores (B, n), of images (B, patches)."""
    chosen = dict(variant=variant, start_layer=start_layer)
    return _of_logits(TransformerAttribution(model, backend, dtype), **chosen)


def gradient_rollout(
    model: PreTrainedModel,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    start_layer: int = 0,
) -> Run:
    """Build `GradientRollout`, or for an encoder-decoder `CrossAttribution`, with source tokens' scores."""
    if reads_a_source(called_module(model)):
        return _of_source(model, backend, dtype, start_layer)
    return _of_logits(GradientRollout(model, backend, dtype), start_layer=start_layer)


def of_class(
    attribute: Callable[..., Any],
    model: PreTrainedModel,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    **chosen: Any,
) -> Run:
    """Build a method that explains a class, given its class `attribute`, called with the options `chosen`.

    attribute(model, backend, dtype) is called with target, contrast and position, and a batch. Its result has
    scores (B, n), target (B,), error and nothing (B,) or None, and the output of the model.
    """
    return _of_logits(attribute(model, backend, dtype), **chosen)


def _of_logits(attribute: Callable[..., Any], **chosen: Any) -> Run:
    """Build a method that explains one logit of each example, called with the options `chosen`."""

    def run(
        batch: Mapping[str, Any],
        targets: Tensor | None,
        contrast: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Rows:
        if not _is_packed(batch):
            one = attribute(**batch, target=targets, contrast=contrast, position=position, **chosen)
            none = torch.zeros_like(one.target, dtype=one.scores.dtype, device=one.scores.device)
            return Rows(one.scores, none, one.target, find_logits(one.output), one.error, one.nothing)
        results = attribute.packed(**batch, target=targets, contrast=contrast, **chosen)
        scores = pad_sequence([one.scores[0] for one in results], batch_first=True)
        known = results[0].error is not None
        return Rows(
            scores,
            torch.zeros_like(scores[:, 0]),
            torch.cat([one.target for one in results]),
            _logits([one.output for one in results]),
            torch.cat([one.error for one in results]) if known else None,
            torch.cat([one.nothing for one in results]),
        )

    return run


def _of_source(model: PreTrainedModel, backend: str, dtype: torch.dtype | None, start_layer: int) -> Run:
    """Build `CrossAttribution`; its `Rows` hold the scores (B, m) of source tokens for the first target."""
    attribute = CrossAttribution(model, backend, dtype)
    if start_layer:
        raise ValueError(f"CrossAttribution: an encoder-decoder has no start_layer, got {start_layer}")

    def run(batch: Mapping[str, Any], targets: Tensor | None, contrast: Tensor | None = None) -> Rows:
        one = attribute(**batch, target=targets, contrast=contrast)
        none = torch.zeros_like(one.source_scores[:, 0])
        return Rows(one.source_scores, none, one.target, find_logits(one.output), None, one.nothing)

    return run


def gradient(name: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
    """Build a method of `GradientAttribution`. It runs torch's own functions, whatever the backend is."""
    return _of_logits(GradientAttribution(model, name, dtype))

"""Methods by name, each called the same way, for `pyglobenc.explain` and the command line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pyglobenc.methods.decompx.decompx import DecompX
from pyglobenc.methods.gradients.attribution import GRADIENTS, REPLACING, GradientAttribution
from pyglobenc.methods.gradients.gradient_rollout import GradientRollout
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.relevance.transformer_attribution import TransformerAttribution
from pyglobenc.methods.relevance.variants import FOLLOWED, VARIANTS
from pyglobenc.methods.rollout.baselines import ROLLOUTS, Rollout
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


@dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes:
        name: the name that users give.
        summary: one line, with the paper.
        build: function of model, backend and dtype, as `GlobEnc` takes them, and of start_layer if the method
            has one. It returns a function that computes the `Rows` of a batch.
        target: "token" if targets are positions, "class" if they are classes of a sequence classifier.
        supports_packing: whether the method also takes packed sequences.
        has_start_layer: whether the method takes start_layer, the lowest layer of its rollout.
        replaces_tokens: whether a batch of texts also holds replacement and special_tokens_mask, as
            `GradientAttribution` takes them.
        next_token: whether the method explains the next token of a language model as a class.
    """

    name: str
    summary: str
    build: Callable[..., Run]
    target: str = "token"
    supports_packing: bool = False
    has_start_layer: bool = False
    replaces_tokens: bool = False
    next_token: bool = False

    def run(
        self, who: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None, start_layer: int = 0
    ) -> Run:
        """Return the function that computes the `Rows` of a batch.

        Raises:
            ValueError: the method has no start_layer, and one above 0 is given. The message begins with
                `who`.
        """
        if self.has_start_layer:
            return self.build(model, backend, dtype, start_layer=start_layer)
        if start_layer != 0:
            having = ", ".join(name for name, method in METHODS.items() if method.has_start_layer)
            raise ValueError(f"{who}: start_layer belongs to {having}; {self.name} has none")
        return self.build(model, backend, dtype)


def _rollout(name: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
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


def _information_flow(model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
    """Build `InformationFlow` to one token, or to the mean of all tokens."""
    attribute = InformationFlow(model, backend, dtype)

    def run(batch: Mapping[str, Any], targets: Tensor | str | None) -> Rows:
        span = torch.stack([targets, targets + 1], 1) if isinstance(targets, Tensor) else targets
        result = attribute(**batch, target_span=span)
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


def _of_logits(
    attribute: TransformerAttribution | GradientRollout | GradientAttribution, **chosen: Any
) -> Run:
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


def _of_class(name: str, summary: str, attribute: Callable[..., Any], **traits: bool) -> Method:
    """Return a method that explains a class; attribute(model, backend, dtype) makes the object to call."""

    def build(
        model: PreTrainedModel, backend: str = "auto", dtype: torch.dtype | None = None, **chosen: Any
    ) -> Run:
        return _of_logits(attribute(model, backend, dtype), **chosen)

    return Method(name, summary, build, target="class", **traits)


# Maps a name to its variant and summary. The last three are computed as in the paper's comparison.
RELEVANCE = {
    "transformer-attribution": (
        "transformer_attribution",
        "relevance times attention gradients, rolled out (Chefer et al., CVPR 2021)",
    ),
    "transformer-attribution-last": (
        "transformer_attribution_last",
        "transformer attribution from the last layer alone, the published default for BERT-base",
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
METHODS["information-flow"] = Method(
    "information-flow",
    "information flow routes: L1 proximity of each head's vectors to the residual stream, summed over the "
    "layers (Ferrando and Voita, 2024)",
    _information_flow,
)
METHODS |= {
    name: Method(
        name,
        summary,
        partial(relevance, variant),
        target="class",
        supports_packing=VARIANTS[variant].kind in FOLLOWED,
        has_start_layer=VARIANTS[variant].kind == "rollout" and VARIANTS[variant].layer is None,
    )
    for name, (variant, summary) in RELEVANCE.items()
}
METHODS["gradient-rollout"] = _of_class(
    "gradient-rollout",
    "rollout of attention times its gradient, for every architecture (Chefer et al., ICCV 2021)",
    GradientRollout,
    supports_packing=True,
    has_start_layer=True,
    next_token=True,
)
METHODS |= {
    name: _of_class(
        name,
        summary,
        # torch's own functions run, whatever the backend is
        lambda model, backend, dtype, name=name: GradientAttribution(model, name, dtype),
        replaces_tokens=name in REPLACING,
        next_token=True,
    )
    for name, summary in GRADIENTS.items()
}
METHODS["decompx"] = _of_class(
    "decompx",
    "decomposed vectors of each input token, propagated up to the logit; signed (Modarressi et al., 2023)",
    DecompX,
)


def find_method(name: str, who: str = "explain") -> Method:
    """Return the method of this name.

    Raises:
        ValueError: there is no such method. The message begins with `who` and lists those that there are.
    """
    if name not in METHODS:
        raise ValueError(f"{who}: method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]

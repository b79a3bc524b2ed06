"""The result of transformer attribution, and its construction from the propagated relevance."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.backends.shared.packing import sequence_sums
from pyglobenc.methods.head import detached
from pyglobenc.methods.inputs import require_finite
from pyglobenc.methods.packing import Packed, of_examples
from pyglobenc.methods.relevance.propagation import RelevancePropagation
from pyglobenc.methods.relevance.states import States
from pyglobenc.methods.rollout.rows import stack_layers

WHO = "TransformerAttribution"


@dataclass
class RelevanceResult:
    """Attribution of one logit for each example.

    Attributes:
        scores: (B, n), one score for each token; padding gets 0. For images (B, patches), or (B, height,
            width) for the variants "full" and "lrp", which score pixels.
        target: (B,) int64, the class explained. For question answering, 0 is the start and 1 the end.
        position: (B,) int64, the token that the head reads; the scores are its row of the rollout. None if
            the head reads the sum or mean of several tokens; the rollout then starts from their shares.
        logit: (B,), the value explained.
        nothing: (B,) bool, True where no relevance reaches any token. The scores are 0 there.
        error: (B,), the relative L2 distance by which rounding moves the scores, without the pooled token's
            own entry; see `reliability`. It is NaN where it is unknown. It is None if reliability is off, and
            for variants that only read attention.
        error_method: "measured" or "estimated"; None if there is no error.
        relevance: (B, L, n), the relevance of each layer's input summed over the hidden size; None unless
            asked for.
        maps: the maps asked for, by name.
        diagnostics: "relevance_sums" (B, layers + 1) and "conservation" (B,). The first holds the total
            relevance of the input of each layer that relevance went through, lowest layer first, and of the
            last layer's output. In exact arithmetic without the guards each total is 1. It is less if the
            head sums tokens, since a feature that is positive at no token passes nothing on. The second is
            the largest distance of these totals from 1.
        output: the output of the model.
    """

    scores: Tensor
    target: Tensor
    position: Tensor | None
    logit: Tensor
    nothing: Tensor
    error: Tensor | None = None
    error_method: str | None = None
    relevance: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None


def relevance_result(
    model: PreTrainedModel, states: States, scores: Tensor, nothing: Tensor, how: str | None
) -> RelevanceResult:
    """Return the result for given scores.

    Args:
        model: the model or the user's module around it; the error message names its broken weights.
        states: tensors of the forward pass.
        scores: (B, n), or (1, N) for S packed sequences; for images one score for each patch.
        nothing: (B,) bool, or (S,), True where no relevance reaches any token.
        how: "measured", "estimated" or None, the way the error is found.

    Returns:
        The result without its error, maps and diagnostics. Packed sequences are one result of S targets.

    Raises:
        ValueError: the scores or the logit are not finite.
    """
    # The clamps and guards of the rules can hide a NaN that the logit shows.
    require_finite(WHO, model, (scores, states.target.logit))
    target, position = states.target, states.head.position
    index, logit = target.index[: states.count], target.logit[: states.count]
    position = None if position is None else position[: states.count]
    return RelevanceResult(
        scores, index, position, logit, nothing, error_method=how, output=detached(states.output)
    )


def add_layers(
    model: PreTrainedModel, result: RelevanceResult, propagation: RelevancePropagation, layers: bool
) -> None:
    """Add the diagnostics, and the maps and relevances that were kept for each layer, to a result.

    Args:
        model: the model or the user's module around it; the error message names its broken weights.
        result: the result that is completed.
        propagation: the finished pass; it holds token sums (B, n) and maps (B, n, n) for each layer.
        layers: also add the relevance of each layer's input, (B, L, n).

    Raises:
        ValueError: a map or a relevance is not finite.
    """
    states = propagation.states
    sums = [
        states.split_perturbed(propagation.token_sums[index])[0] for index in sorted(propagation.token_sums)
    ]
    if sums:
        totals = stack_layers(
            [t.sum(-1) if states.cu_seqlens is None else sequence_sums(t, states.cu_seqlens) for t in sums]
        )
        result.diagnostics = {"relevance_sums": totals, "conservation": (totals - 1).abs().amax(1)}
    if layers:
        result.relevance = stack_layers(sums[:-1])
    for name, by_layer in propagation.maps.items():
        result.maps[name] = stack_layers(
            [states.split_perturbed(by_layer[index])[0] for index in sorted(by_layer)]
        )
    kept = [*result.maps.values(), *([result.relevance] if layers else [])]
    if kept:
        require_finite(WHO, model, kept)


def of_sequences(result: RelevanceResult, packed: Packed) -> list[RelevanceResult]:
    """Cut the result of packed sequences into one result for each sequence.

    Args:
        result: a result with scores (1, N) and S targets.
        packed: how the sequences are packed.

    Returns:
        S results of batch size 1, with scores (1, n), in the order in which the sequences were given.
    """

    def one(own: slice, tokens: slice) -> RelevanceResult:
        return RelevanceResult(
            scores=result.scores[:, tokens],
            target=result.target[own],
            position=None if result.position is None else result.position[own],
            logit=result.logit[own],
            nothing=result.nothing[own],
            error=None if result.error is None else result.error[own],
            error_method=result.error_method,
            relevance=None if result.relevance is None else result.relevance[..., tokens],
            diagnostics={name: t[own] for name, t in result.diagnostics.items()},
            output=of_examples(result.output, own, len(packed.order)),
        )

    return packed.cut(one)

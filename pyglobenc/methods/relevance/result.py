"""What transformer attribution returns, from a descent of relevance."""

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
    """Attribution of one logit an example.

    Attributes:
        scores: (B, n) tokens, padding 0; for images (B, patches), or (B, height, width) pixels of the
            variants "full" and "lrp".
        target: (B,) int64, the class explained; 0 or 1 for a span's start or end.
        position: (B,) int64, the token that the head reads, whose row the scores are; None of a head that
            reads the sum or mean of several, for which the row starts from each one's share.
        logit: (B,), the value explained.
        nothing: (B,) bool, whether no relevance reaches any token: the scores are then 0.
        error: (B,), how far rounding moves the scores: relative L2 distance, the pooled token's own entry
            left out; see `reliability`. NaN where it is unknown; None when it is off, and for variants that
            only read attention.
        error_method: "measured" or "estimated"; None without error.
        relevance: (B, L, n), relevance of each layer's input summed over the hidden size; None unless asked
            for.
        maps: the maps asked for, by name.
        diagnostics: "relevance_sums" (B, layers + 1), the sum of the relevance of the input of each layer
            that it went through, lowest first, and of the last layer's output: 1 in exact arithmetic without
            the guards, less of a head that sums tokens, whose features without a positive token pass nothing
            on; "conservation" (B,), the largest distance of these from 1.
        output: what the model returned.
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
    """Result of scores (B, n), of packed sequences (1, N) with what else there is of each (S,); ValueError
    when they aren't finite.
    """
    # the rules' clamps and guards may hide what the logit shows
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
    """Add to a result what a propagation kept of every layer; layers: also the relevance of its input.
    ValueError when it isn't finite.
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
    """A result of packed sequences cut into each one's, in the order in which they were given."""

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

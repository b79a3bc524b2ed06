"""The function `explain_layers` takes a text and returns its scores in every layer of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyglobenc.common.arguments import known_arguments
from pyglobenc.explain.texts import explain
from pyglobenc.inputs.pipelines import takes_pipelines
from pyglobenc.inputs.windows import Text, encode
from pyglobenc.results.layers import LayerAttribution

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RELEVANCE = "transformer-attribution"


@takes_pipelines
@known_arguments
def explain_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    method: str = "globenc",
    *,
    target: int | str | None = None,
    maps: bool = False,
    merge_words: bool = False,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> LayerAttribution:
    """Compute how much each token of a text contributes, for every layer of the model.

    Args:
        model, tokenizer, target, merge_words, backend, dtype: as for `explain`.
        text: one text, or a pair of texts as a tuple. It must fit the model.
        method: a rollout method, which is one of `pyglobenc.methods.rollout.baselines.ROLLOUTS`, or
            "transformer-attribution".
        maps: also return the map of every layer. This takes O(L*n*n) memory.

    Returns:
        LayerAttribution with scores (L, n), and maps (L, n, n) if they are asked for.

    Raises:
        TypeError, ValueError: as for `explain`; also, the method has no scores by layer, or there are several
            texts.
    """
    # These imports take seconds.
    import torch

    from pyglobenc.hf.unwrap import called_module, stock_model
    from pyglobenc.inputs.batches import longest
    from pyglobenc.methods.arguments import accepts
    from pyglobenc.methods.registry import find_method
    from pyglobenc.methods.relevance.transformer_attribution import TransformerAttribution
    from pyglobenc.methods.rollout.baselines import ROLLOUTS, Rollout

    find_method(method, "explain_layers")
    if method not in (*ROLLOUTS, RELEVANCE):
        raise ValueError(
            f"explain_layers: {method} has no scores by layer; these methods have them: "
            f"{', '.join((*ROLLOUTS, RELEVANCE))}"
        )
    if not isinstance(text, str | tuple):
        raise TypeError(f"explain_layers: text must be one text or a pair, got {type(text).__name__}")
    chosen = dict(merge_words=merge_words, backend=backend, dtype=dtype, progress=False)
    whole = explain(model, tokenizer, text, method, target=target, **chosen)
    called = called_module(model)
    one = encode(tokenizer, text, "text", longest(stock_model(called), tokenizer, None))
    columns = one.inputs | {"attention_mask": [1] * len(one.tokens)}
    device = stock_model(called).device
    batch = {
        name: torch.tensor([ids], device=device) for name, ids in columns.items() if accepts(called, name)
    }
    if method == RELEVANCE:
        wanted = dict(layers=True, maps=("map",) if maps else ())
        found = TransformerAttribution(model, backend, dtype)(**batch, target=whole.target, **wanted)
        scores, log_scale = found.relevance[0], torch.zeros(found.relevance.shape[1])
        kept = found.maps.get("map")
    else:
        wanted = dict(layers=True, maps=("layers",) if maps else ())
        rows = target if target in (None, "mean") else [whole.target]
        found = Rollout(model, method, backend, dtype)(**batch, targets=rows, **wanted)
        scores, log_scale = found.layer_scores[0, :, 0], found.layer_log_scale[0, :, 0]
        kept = found.maps.get("layers")
    return LayerAttribution(
        whole,
        scores.detach().cpu().numpy(),
        log_scale.detach().double().cpu().numpy(),
        None if kept is None else kept[0].detach().cpu().numpy(),
    )

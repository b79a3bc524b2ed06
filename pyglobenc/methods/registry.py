"""Methods by name, each called the same way, for `pyglobenc.explain` and the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from pyglobenc.hf.registry import BINDINGS
from pyglobenc.hf.streams.architectures import bart, t5
from pyglobenc.methods.builders import (
    Run,
    gradient,
    gradient_rollout,
    information_flow,
    of_class,
    relevance,
    rollout,
)
from pyglobenc.methods.decompx.decompx import DecompX
from pyglobenc.methods.gradients.attcat import AttCat
from pyglobenc.methods.gradients.attribution import GRADIENTS, REPLACING
from pyglobenc.methods.gradients.backward_rules import RULES

# The `model_type`s that a method takes, by the words that describe them.
BERT_AND_VIT = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "vit", "deit")
POST_NORM = (*BERT_AND_VIT[:6], "albert", "mpnet", "nomic_bert", "deberta-v2")
ENCODER_DECODERS = (*bart.MODEL_TYPES, *t5.MODEL_TYPES, "encoder-decoder")
MODELS = {
    "every model": tuple(BINDINGS),
    "every model, encoder-decoders": (*BINDINGS, *ENCODER_DECODERS),
    "BERT's layer": tuple(name for name in POST_NORM if name != "nomic_bert"),
    "post-norm encoders": POST_NORM,
    "BERT and ViT kinds": BERT_AND_VIT,
}


@dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes:
        name: the name that users give.
        summary: one line, with the paper.
        build: function of model, backend and dtype, as `GlobEnc` takes them, and of start_layer if the method
            has one. It returns a function that computes the `Rows` of a batch.
        defined_for: the models that the paper defines the method for. Other models extend the paper.
        models: the models that the method takes, a key of MODELS.
        cost: what the method computes, in passes of the model.
        target: "token" if targets are positions, "class" if they are classes of a sequence classifier.
        supports_packing: whether the method also takes packed sequences.
        has_start_layer: whether the method takes start_layer, the lowest layer of its rollout.
        replaces_tokens: whether a batch of texts also holds replacement and special_tokens_mask, as
            `GradientAttribution` takes them.
        next_token: whether the method explains the next token of a language model as a class.
        has_spans: whether the method takes target_span, reasoning_span and hops, as `InformationFlow` does.
    """

    name: str
    summary: str
    build: Callable[..., Run]
    defined_for: str
    models: str = "every model"
    cost: str = "1 forward pass, 1 pass over the pairs of tokens"
    target: str = "token"
    supports_packing: bool = False
    has_start_layer: bool = False
    replaces_tokens: bool = False
    next_token: bool = False
    has_spans: bool = False

    def run(
        self,
        who: str,
        model: PreTrainedModel,
        backend: str,
        dtype: torch.dtype | None,
        start_layer: int = 0,
        **spans: Any,
    ) -> Run:
        """Return the function that computes the `Rows` of a batch.

        Raises:
            ValueError: the method has no start_layer, and one above 0 is given, or it has no spans. The
                message begins with `who`.
        """
        if spans and not self.has_spans:
            having = ", ".join(name for name, method in METHODS.items() if method.has_spans)
            raise ValueError(f"{who}: {', '.join(spans)} belongs to {having}; {self.name} has none")
        if self.has_start_layer:
            return self.build(model, backend, dtype, start_layer=start_layer)
        if start_layer != 0:
            having = ", ".join(name for name, method in METHODS.items() if method.has_start_layer)
            raise ValueError(f"{who}: start_layer belongs to {having}; {self.name} has none")
        return self.build(model, backend, dtype, **spans)


def _rollout(name: str, summary: str, defined_for: str, **more: str) -> Method:
    """Return the entry of `GlobEnc` or of a method of `Rollout`."""
    packs = name != "attention-flow"
    return Method(name, summary, partial(rollout, name), defined_for, supports_packing=packs, **more)


def _relevance(name: str, summary: str, passes: str, **more: bool) -> Method:
    """Return the entry of a variant of `TransformerAttribution`."""
    return Method(
        name,
        summary,
        partial(relevance, RELEVANCE[name]),
        "BERT and ViT kinds",
        models="BERT and ViT kinds",
        cost=passes,
        target="class",
        **more,
    )


def _gradient(name: str, cost: str, defined_for: str = "every model") -> Method:
    """Return the entry of a method of `GradientAttribution`."""
    return Method(
        name,
        RULES[name].summary if name in RULES else GRADIENTS[name],
        partial(gradient, name),
        defined_for,
        cost=cost,
        target="class",
        replaces_tokens=name in REPLACING,
        next_token=True,
    )


# The variant of `TransformerAttribution` that each name stands for. The last three are computed as in the
# paper's comparison.
RELEVANCE = {
    "transformer-attribution": "transformer_attribution",
    "transformer-attribution-last": "transformer_attribution_last",
    "lrp": "lrp",
    "partial-lrp": "lrp_last_layer",
    "attention-gradcam": "attn_gradcam",
}
_BACKWARD = "1 forward and 1 backward pass"
_ENTRIES = (
    _rollout(
        "raw-attention",
        "attention of the last layer, averaged over heads",
        "every model",
    ),
    _rollout(
        "w",
        "rollout of attention without a residual (W; Modarressi et al., 2022)",
        "post-norm encoders",
    ),
    _rollout(
        "attention-rollout",
        "rollout of attention with a fixed residual of one half (W-FixedRes; Abnar and Zuidema, 2020)",
        "every model",
    ),
    _rollout(
        "w-res",
        "rollout of attention with the measured mixing ratio as residual (W-Res; Modarressi et al., 2022)",
        "post-norm encoders",
    ),
    _rollout(
        "n-fixedres",
        "rollout of the norms N, rows summing to 1, with a fixed residual of one half (N-FixedRes)",
        "post-norm encoders",
    ),
    _rollout(
        "n",
        "rollout of the norms N: attention and value vectors (Kobayashi et al., 2020)",
        "post-norm encoders",
    ),
    _rollout(
        "n-res",
        "rollout of the norms N_Res: with the residual",
        "post-norm encoders",
    ),
    _rollout(
        "n-resln",
        "rollout of the norms N_ResLN: with the residual and the first LayerNorm (Kobayashi et al., 2021)",
        "post-norm encoders",
        models="post-norm encoders",
    ),
    _rollout(
        "globenc",
        "rollout of the norms N_Enc: the whole encoder layer (Modarressi et al., 2022)",
        "post-norm encoders",
    ),
    _rollout(
        "attention-flow",
        "maximum flow through attention with a fixed residual of one half (Abnar and Zuidema, 2020)",
        "every model",
        cost="1 forward pass, 1 maximum flow per token",
    ),
    _rollout(
        "alti",
        "rollout of ALTI: L1 proximity of each token's vector to the attention block's output (Ferrando et "
        "al., 2022)",
        "post-norm encoders",
        cost="1 forward pass, 1 pass over the pairs of tokens and features",
    ),
    Method(
        "information-flow",
        "information flow routes: L1 proximity of each head's vectors to the residual stream, summed over "
        "the layers (Ferrando and Voita, 2024)",
        information_flow,
        "decoders",
        has_spans=True,
    ),
    _relevance(
        "transformer-attribution",
        "relevance times attention gradients, rolled out (Chefer et al., CVPR 2021)",
        "about 5 forward passes",
        supports_packing=True,
        has_start_layer=True,
    ),
    _relevance(
        "transformer-attribution-last",
        "transformer attribution from the last layer alone, the published default for BERT-base",
        "1 forward pass, the relevance of 1 layer",
        supports_packing=True,
    ),
    _relevance(
        "lrp",
        "layer-wise relevance of the input tokens, summed over the hidden size; signed (Binder et al., 2016)",
        "about 6 forward passes",
        supports_packing=True,
    ),
    _relevance(
        "partial-lrp",
        "layer-wise relevance of the last layer's attention (Voita et al., 2019)",
        "1 forward pass, the relevance of 1 layer",
        supports_packing=True,
    ),
    _relevance(
        "attention-gradcam",
        "Grad-CAM on the last layer's attention (after Selvaraju et al., 2017)",
        "1 forward pass, the gradient of 1 layer",
    ),
    Method(
        "gradient-rollout",
        "rollout of attention times its gradient, for every architecture (Chefer et al., ICCV 2021)",
        gradient_rollout,
        "encoders, encoder-decoders",
        models="every model, encoder-decoders",
        cost=_BACKWARD + ", 1 pass over the pairs of tokens",
        target="class",
        supports_packing=True,
        has_start_layer=True,
        next_token=True,
    ),
    Method(
        "attcat",
        "gradient times input at every layer, times the mean attention that the token receives; signed "
        "(Qiang et al., 2022)",
        partial(of_class, AttCat),
        "encoders",
        cost=_BACKWARD + ", 1 pass over the pairs of tokens",
        target="class",
        next_token=True,
    ),
    _gradient("gradient-x-input", _BACKWARD),
    _gradient("gradient-x-input-norm", _BACKWARD),
    _gradient("saliency", _BACKWARD),
    _gradient("integrated-gradients", "2 forward passes, 32 or 160 forward and backward passes"),
    _gradient("occlusion", "1 forward pass per token, and 1 more"),
    _gradient("attnlrp", _BACKWARD),
    _gradient("cp-lrp", _BACKWARD, "encoders"),
    _gradient("gim", _BACKWARD, "decoders"),
    _gradient("libragrad", _BACKWARD, "image encoders"),
    Method(
        "decompx",
        "vectors of each input token, propagated up to the logit; signed (Modarressi et al., 2023)",
        partial(of_class, DecompX),
        "BERT and RoBERTa",
        models="BERT's layer",
        cost="2 forward passes, and about 0.7 per token for its default split of biases",
        target="class",
    ),
)
METHODS = {method.name: method for method in _ENTRIES}


def find_method(name: str, who: str = "explain") -> Method:
    """Return the method of this name.

    Raises:
        ValueError: there is no such method. The message begins with `who` and lists those that there are.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"{who}: method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]

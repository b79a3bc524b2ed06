"""Transformer attribution: relevance times attention gradients, rolled out (Chefer, Gur and Wolf, CVPR 2021), and its variants."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.autocast import callers_autocast, outside_autocast
from pyglobenc.hf import find_layers, vit
from pyglobenc.methods.inputs import check_batch, check_model
from pyglobenc.methods.relevance_descent import MAPS, Descent
from pyglobenc.methods.relevance_rules import LrpRules, Rules
from pyglobenc.methods.relevance_states import States, run_forward
from pyglobenc.methods.relevance_target import Index, head_kind
from pyglobenc.methods.relevance_variants import PUBLISHED, VARIANTS, Variant, variant_scores
from pyglobenc.methods.reliability import DIGITS_GONE, METHODS, PrecisionWarning, distance, measured
from pyglobenc.methods.rollout import stack_layers
from pyglobenc.values import may_look, require


@dataclass
class RelevanceResult:
    """Attribution of one logit an example.

    Attributes:
        scores: (B, n) tokens, padding 0; for images (B, patches), or (B, height, width) pixels of the variants "full" and "lrp".
        target: (B,) int64, the class explained; 0 or 1 for a span's start or end.
        position: (B,) int64, the pooled token, whose row the scores are.
        logit: (B,), the value explained.
        error: (B,), how far rounding moves the scores: relative L2 distance, the pooled token's own entry left out; see `reliability`.
            None when it is off, and for variants that only read attention.
        error_method: "measured" or "estimated"; None without error.
        relevance: (B, L, n), relevance of each layer's input summed over the hidden size; None unless asked for.
        maps: the maps asked for, by name.
        diagnostics: "relevance_sums" (B, layers + 1), the sum of the relevance of the input of each layer that it went through, lowest
            first, and of the last layer's output: 1 in exact arithmetic without the guards; "conservation" (B,), the largest distance
            of these from 1.
        output: what the model returned.
    """

    scores: Tensor
    target: Tensor
    position: Tensor
    logit: Tensor
    error: Tensor | None = None
    error_method: str | None = None
    relevance: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    output: Any = None


class TransformerAttribution:
    """Transformer attribution of a stock transformers classifier: BERT and its relatives, DistilBERT, ViT, DeiT.

    Args:
        model: a known architecture with a head, in evaluation mode; left as it is.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: of the arithmetic; None is float32, or float64 for a float64 model. torch.float64 runs the forward pass and the
            relevance in double on a narrower model, weight by weight, without a second copy of it.
        stabilizer: 0 for the published guard of the divisions; e > 0 replaces it, where a sum of both signs is divided by, by
            b + e * sign(b).

    Raises:
        TypeError, ValueError: unknown architecture, head or backend, training mode, weights that are NaN or infinite.

    Source: Chefer et al., 2021, and its published code, whose guards are kept to the letter.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto", dtype: torch.dtype | None = None, stabilizer: float = 0.0):
        model = check_model("TransformerAttribution", model, backend, dtype)
        if not 0 <= stabilizer < float("inf"):
            raise ValueError(f"TransformerAttribution: stabilizer must be 0 or a positive number, got {stabilizer}")
        self.model = model
        self.dtype = dtype
        self.kind = head_kind(model)
        self.depth = len(found := find_layers(model))
        self.weights = sum(p.numel() for layer in found for p in layer.block.parameters())
        images = model.config.model_type in vit.MODEL_TYPES
        # tokens before the patches of an image; None for text
        self.prefix = len(vit.prefix_tokens(model.base_model)) if images else None
        self.rules = Rules(backend, stabilizer)
        self.lrp = LrpRules(backend, stabilizer)

    @outside_autocast
    def __call__(
        self,
        *,
        target: Any = None,
        contrast: Index = None,
        position: Index = None,
        start_layer: int = 0,
        variant: str = "transformer_attribution",
        layers: bool = False,
        maps: Sequence[str] = (),
        reliability: str = "auto",
        **batch: Any,
    ) -> RelevanceResult:
        """Attribute one logit of every example to its tokens or patches; no (n, n) array is stored unless maps asks for one.

        Args:
            target: class explained, one or (B,), None: the predicted one; a question answerer's "start" (default) or "end"; a choice.
            contrast: class whose logit is subtracted, one or (B,): the difference is explained as one output.
            position: token whose logit is explained, one or (B,), for heads with a logit a token; of a question answerer by default
                the one with the largest logit.
            start_layer: first layer of the rollout; the published BERT code's default is 11, its notebook's and ViT's 0.
            variant: a name in VARIANTS or PUBLISHED, see `relevance_variants`.
            layers: also return the relevance of every layer's input.
            maps: any of "map" (B, L, n, n), the matrix A that the rollout adds to the identity; "alpha", "R_alpha", "grad_alpha"
                (B, L, H, n, n); "R_in" (B, L, n, d).
            reliability: how `error` is found, see `reliability`: "measured" up to doubles the time, "estimated" costs little, "auto"
                measures small float32 inputs and estimates the others; "off". A PrecisionWarning is given above 1e-2.
            batch: the model's inputs, as its tokenizer or image processor returns them.

        Returns:
            RelevanceResult. scores are the published ones before the pooled token's own entry is overwritten; every example's are what
            it gets alone, without padding.

        Raises:
            TypeError, ValueError: unknown variant or map, an index out of range, input that the model can't take, a result that
                isn't finite.
        """
        chosen = self._variant(variant, start_layer, maps, reliability)
        self._check(batch)
        if self.kind == "choice":
            batch, target, contrast = self._one_choice(batch, target, contrast)
        everything = layers or bool(maps)
        lowest = 0 if everything else chosen.lowest_gradient(start_layer, self.depth)
        how = self._error_method(reliability, chosen, batch)
        states = run_forward(self.model, batch, self.kind, (target, contrast, position), self.dtype, lowest, how == "measured")
        descent = self._descent(states, chosen, how == "estimated")
        scores = variant_scores(self.model, chosen, descent, start_layer, self.prefix)
        scores, moved = scores.chunk(2) if how == "measured" else (scores, None)
        result = self._result(scores, states, how)
        if how == "measured":
            own = result.position.to(scores.device) if self.prefix is None and chosen.kind != "input" else None
            result.error = distance(moved, scores, own)
        elif how == "estimated":
            result.error = descent.estimated_error()
        self._warn(result)
        if everything:
            descent = self._descent(states, chosen)
            descent.roll_out(self.depth, 0, tuple(maps))
        self._add_layers(result, descent, layers)
        return result

    def _descent(self, states: States, chosen: Variant, estimate: bool = False) -> Descent:
        return Descent(states, self.lrp if chosen.lrp else self.rules, chosen.gradient, self.prefix is None, estimate)

    def _error_method(self, reliability: str, chosen: Variant, batch: Mapping[str, Any]) -> str | None:
        if reliability == "off" or chosen.kind not in ("rollout", "layer", "input"):
            return None
        if reliability != "auto":
            return reliability
        single = torch.float64 not in (self.dtype, self.model.dtype)
        return "measured" if single and measured(self.weights * self._tokens(batch), self.model.device) else "estimated"

    def _tokens(self, batch: Mapping[str, Any]) -> int:
        """Tokens of a batch, padding and those before an image's patches among them."""
        if self.prefix is None:
            ids = batch.get("input_ids")
            return batch["inputs_embeds"][..., 0].numel() if ids is None else ids.numel()
        pixels, step = batch["pixel_values"], vit.patch_projection(self.model.base_model).stride
        return len(pixels) * (self.prefix + (pixels.shape[2] // step[0]) * (pixels.shape[3] // step[1]))

    @staticmethod
    def _warn(result: RelevanceResult) -> None:
        if result.error is not None and may_look() and (result.error > DIGITS_GONE).any():
            worst, count = float(result.error.max()), int((result.error > DIGITS_GONE).sum())
            warnings.warn(
                f"TransformerAttribution: rounding moves the scores of {count} of {len(result.error)} examples by more than "
                f"{DIGITS_GONE:.0%} (at worst {worst:.1%}, {result.error_method}); use dtype=torch.float64, or a stabilizer",
                PrecisionWarning,
                stacklevel=4,
            )

    def _variant(self, variant: str, start_layer: int, maps: Sequence[str], reliability: str) -> Variant:
        name, depth = PUBLISHED.get(variant, variant), self.depth
        if name not in VARIANTS:
            raise ValueError(f"TransformerAttribution: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if isinstance(start_layer, bool) or not isinstance(start_layer, int):
            raise TypeError(f"TransformerAttribution: start_layer must be an integer, got {start_layer!r}")
        if not 0 <= start_layer < depth:
            raise ValueError(f"TransformerAttribution: start_layer must lie in [0, {depth}), the model's layers, got {start_layer}")
        if isinstance(maps, str) or not set(maps) <= set(MAPS):
            raise ValueError(f"TransformerAttribution: maps must be a sequence of names among {', '.join(MAPS)}, got {maps!r}")
        if reliability not in METHODS:
            raise ValueError(f"TransformerAttribution: reliability must be one of {', '.join(METHODS)}, got {reliability!r}")
        chosen = VARIANTS[name]
        if chosen.layer is not None and chosen.layer >= depth:
            raise ValueError(f"TransformerAttribution: {variant} needs {chosen.layer + 1} layers, the model has {depth}")
        return chosen

    def _check(self, batch: Mapping[str, Any]) -> None:
        who = "TransformerAttribution"
        if self.prefix is None:
            flat = {k: v.flatten(0, 1) if self.kind == "choice" and isinstance(v, Tensor) and v.dim() > 2 else v for k, v in batch.items()}
            check_batch(who, self.model, flat)
            return
        if self.model.training:
            raise ValueError(f"{who}: the model is in training mode, where dropout changes the result; call model.eval() first")
        pixels = batch.get("pixel_values")
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or 0 in pixels.shape:
            came = "nothing" if pixels is None else tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(f"{who}: pixel_values must be a tensor (B, channels, height, width), got {came}")

    def _one_choice(self, batch: Mapping[str, Any], target: Any, contrast: Index) -> tuple[dict[str, Any], int, None]:
        """The batch cut to the choice explained: a choice's logit depends on its own text alone."""
        if contrast is not None:
            raise ValueError("TransformerAttribution: contrast needs classes of one input; the choices are different inputs")
        inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 2}
        first = next(iter(inputs.values()))
        if target is None:
            with torch.no_grad(), callers_autocast():
                target = self.model(**{**batch, "return_dict": True}).logits.argmax(-1)
        index = torch.as_tensor(target, device=first.device).expand(first.shape[0])
        if int(index.min()) < 0 or int(index.max()) >= first.shape[1]:
            raise ValueError(f"TransformerAttribution: target must lie in [0, {first.shape[1]}), the choices, got {index.tolist()}")
        rows = torch.arange(first.shape[0], device=first.device)
        return {**batch, **{name: value[rows, index][:, None] for name, value in inputs.items()}}, 0, None

    @staticmethod
    def _result(scores: Tensor, states: States, how: str | None) -> RelevanceResult:
        message = "TransformerAttribution: the attribution is not finite; the activations hold NaN or infinity for this input"
        require(torch.isfinite(scores).all(), lambda: ValueError(message))
        for name, value in states.output.items():
            if isinstance(value, Tensor):
                states.output[name] = value.detach()
        index, position, logit = (t[: len(scores)] for t in (states.target.index, states.target.position, states.target.logit))
        return RelevanceResult(scores, index, position, logit, error_method=how, output=states.output)

    @staticmethod
    def _add_layers(result: RelevanceResult, descent: Descent, layers: bool) -> None:
        count = len(result.scores)
        sums = [descent.token_sums[index][:count] for index in sorted(descent.token_sums)]
        if sums:
            totals = stack_layers([t.sum(-1) for t in sums])
            result.diagnostics = {"relevance_sums": totals, "conservation": (totals - 1).abs().amax(1)}
        if layers:
            result.relevance = stack_layers(sums[:-1])
        for name, by_layer in descent.maps.items():
            result.maps[name] = stack_layers([by_layer[index][:count] for index in sorted(by_layer)])

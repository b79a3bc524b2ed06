"""Transformer attribution and its variants (Chefer, Gur and Wolf, CVPR 2021).

The method multiplies the relevance of the attention probabilities by their gradients, and rolls the resulting
maps out over the layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import callers_autocast, outside_autocast
from pyglobenc.common.deferred import may_look
from pyglobenc.common.integers import integers
from pyglobenc.hf import find_layers
from pyglobenc.hf.architectures import vit
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.arguments import check_maps, check_start_layer, model_inputs, packed_inputs, run_model
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.inputs import check_batch, check_model
from pyglobenc.methods.packing import Packed, in_order, pack
from pyglobenc.methods.precision.relevance_error import ObservedRules
from pyglobenc.methods.precision.reliability import (
    MODES,
    distance,
    examples_reordered,
    known,
    measured,
    warn_of_nothing,
    warn_of_precision,
)
from pyglobenc.methods.relevance.propagation import MAPS, RelevancePropagation
from pyglobenc.methods.relevance.result import RelevanceResult, add_layers, of_sequences, relevance_result
from pyglobenc.methods.relevance.rules import LrpRules, Rules
from pyglobenc.methods.relevance.states import States, run_forward
from pyglobenc.methods.relevance.variants import FOLLOWED, PUBLISHED, VARIANTS, Variant, variant_scores
from pyglobenc.methods.target import Index

WHO = "TransformerAttribution"


class TransformerAttribution:
    """Transformer attribution of a transformers classifier: BERT and its relatives, DistilBERT, ViT, DeiT.

    The head computes the logit from the last layer's output. It may lie in the model or in a user's module
    around it. It must be a chain of Linear modules, activations and layer norms that reads one token, or the
    sum or mean of several. Every call checks this, and other heads are refused.

    Args:
        model: a known architecture with a head, or a user's module with a head of its own around one, in
            evaluation mode. It is not changed.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: dtype of the arithmetic. None means float32, or float64 for a float64 model. With
            torch.float64 on a narrower model, the forward pass and the relevance are computed in float64.
            Each weight is converted when it is used, so there is no second copy of the model.
        stabilizer: 0 for the published guard of the divisions. With e > 0, divisions by a sum b of both signs
            divide by b + e * sign(b) instead.

    Raises:
        TypeError, ValueError: an unknown architecture or backend, or a model in training mode.

    Source: Chefer et al., 2021, and its published code, whose guards are kept exactly.
    """

    @known_arguments
    def __init__(
        self,
        model: nn.Module,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        stabilizer: float = 0.0,
    ):
        model = check_model("TransformerAttribution", model, backend, dtype)
        if not 0 <= stabilizer < float("inf"):
            raise ValueError(
                f"TransformerAttribution: stabilizer must be 0 or a positive number, got {stabilizer}"
            )
        self.model = model
        self.dtype = dtype
        # The transformers model inside the user's module.
        self.stock = stock_model(model)
        self.depth = len(found := find_layers(model))
        self.weights = sum(p.numel() for layer in found for p in layer.block.parameters())
        images = self.stock.config.model_type in vit.MODEL_TYPES
        # The number of tokens before the patches of an image; None for text.
        self.prefix = len(vit.prefix_tokens(self.stock.base_model)) if images else None
        # The class of the relevance rules, unless the variant has its own.
        self.rules = Rules
        self.backend = backend
        self.stabilizer = stabilizer

    @known_arguments
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
        """Attribute one logit of each example to its tokens or patches.

        No (n, n) array is stored unless maps asks for one.

        Args:
            target: the class explained, one for all examples or (B,). None means the predicted class. For
                question answering it is "start" (the default) or "end", for multiple choice the choice.
            contrast: the class whose logit is subtracted, one for all examples or (B,). The difference of
                the two logits is explained as one output.
            position: the token whose logit is explained, one for all examples or (B,), if the head has
                logits for every token. For question answering the default is the token with the largest
                logit.
            start_layer: the lowest layer of the rollout. The default of the published BERT code is 11, and
                that of its notebook and of the published ViT code is 0. Variants without a rollout, and that
                of the last layer alone, ignore it.
            variant: a name in VARIANTS or PUBLISHED; see `relevance_variants`.
            layers: also return the relevance of each layer's input.
            maps: any of "map" (B, L, n, n), the matrix A that the rollout adds to the identity; "alpha",
                "R_alpha", "grad_alpha" (B, L, H, n, n); "R_in" (B, L, n, d).
            reliability: how `error` is found; see `reliability`. "measured" takes up to twice the time, and
                "estimated" costs little. "auto" measures small inputs and images, and estimates the others.
                "off" leaves the error out. A PrecisionWarning is given where the error is above 1e-2 or
                unknown (NaN), and a NoRelevanceWarning where no token gets any relevance and the scores are
                0.
            batch: the model's inputs, as its tokenizer or image processor returns them: input_ids and
                attention_mask (B, n), or pixel_values (B, channels, height, width).

        Returns:
            RelevanceResult with scores (B, n). The published code overwrites the pooled token's own score;
            here it is kept. Each example gets the scores that it would get alone, without padding.

        Raises:
            TypeError, ValueError: a variant or map is unknown, an index is out of range, the model cannot
                take the input, the relevance rules do not cover the head, or a result or a logit is not
                finite. In the last case the error names the parameter that holds NaN or infinity.
        """
        batch = model_inputs("TransformerAttribution", self.model, batch, TransformerAttribution.__call__)
        chosen = self._variant(variant, start_layer, maps, reliability)
        self._check(batch)
        if self.has_choices(batch):
            batch, target, contrast = self._one_choice(batch, target, contrast)
        how = self._error_method(reliability, chosen, batch)
        return self._attribute(batch, (target, contrast, position), chosen, start_layer, layers, maps, how)

    @known_arguments
    @outside_autocast
    def packed(
        self,
        *,
        target: Any = None,
        contrast: Index = None,
        start_layer: int = 0,
        variant: str = "transformer_attribution",
        layers: bool = False,
        reliability: str = "auto",
        **batch: Any,
    ) -> list[RelevanceResult]:
        """Attribute one logit of each of S sequences, packed into one so that there is no padding.

        Args:
            target, contrast: classes, one for all sequences or (S,), as for a batch.
            start_layer, layers: as for a batch.
            variant: one that propagates relevance. Those that only read attention need padded batches.
            reliability: "measured" or "off". "auto" measures small inputs and gives no error for others.
            batch: the model's inputs by name, each a list with one entry for each sequence. This is what the
                model's tokenizer returns if it is asked for neither padding nor tensors.

        Returns:
            S results of batch size 1, with scores (1, n), in the order of the sequences. Each is what the
            sequence gives alone.

        Raises:
            TypeError, ValueError: as for a batch. Also, the model has no single set of logits for a sequence,
                or it cannot take packed sequences.
        """
        who, chosen = "TransformerAttribution", self._variant(variant, start_layer, (), reliability)
        batch = packed_inputs(who, batch, TransformerAttribution.packed)
        if chosen.kind not in FOLLOWED:
            raise ValueError(f"{who}: {variant} only reads attention, and cannot take packed sequences")
        if reliability == "estimated":
            raise ValueError(
                f"{who}: for packed sequences reliability must be measured, off or auto, got 'estimated'"
            )
        with torch.inference_mode(False):
            packed = pack(who, self.model, batch)
        explained = tuple(
            in_order("TransformerAttribution", name, index, packed.order)
            for name, index in (("target", target), ("contrast", contrast), ("position", None))
        )
        how = self._error_method(reliability, chosen, packed.inputs)
        how = None if how == "estimated" else how
        with examples_reordered(packed.order):
            whole = self._attribute(packed, explained, chosen, start_layer, layers, (), how)
        return of_sequences(whole, packed)

    def _attribute(
        self,
        batch: Mapping[str, Any] | Packed,
        explained: tuple[Any, Index, Index],
        chosen: Variant,
        start_layer: int,
        layers: bool,
        maps: Sequence[str],
        how: str | None,
    ) -> RelevanceResult:
        """Attribute a checked batch, or packed sequences as one result of S targets.

        explained holds the target, contrast and position; how is "measured", "estimated" or None.
        """
        everything = layers or bool(maps)
        lowest = 0 if everything else chosen.lowest_gradient(start_layer, self.depth)
        states = run_forward(self.model, batch, explained, self.dtype, lowest, how == "measured")
        propagation = self._propagation(states, chosen)
        if how == "estimated":
            propagation.rules = ObservedRules(propagation.rules, states)
        found, nothing = variant_scores(self.stock, chosen, propagation, start_layer, self.prefix)
        scores, moved = states.split_perturbed(found)
        result = relevance_result(self.model, states, scores, nothing[: states.count], how)
        if how == "measured":
            left_out = self.prefix is None and chosen.kind != "input" and states.head.position is not None
            own = states.split_perturbed(states.pooled_index(scores.device))[0] if left_out else None
            result.error = known(distance(moved, scores, own, states.cu_seqlens), result.nothing)
        elif how == "estimated":
            result.error = known(propagation.rules.estimated_error(), result.nothing)
        warn_of_nothing(WHO, result.nothing)
        if result.error is not None:
            warn_of_precision(
                WHO, result.error, result.nothing, how, "use dtype=torch.float64, or a stabilizer"
            )
        if everything:
            propagation = self._propagation(states, chosen)
            propagation.roll_out(self.depth, 0, tuple(maps))
        add_layers(self.model, result, propagation, layers)
        return result

    def _propagation(self, states: States, chosen: Variant) -> RelevancePropagation:
        rules = (LrpRules if chosen.lrp else self.rules)(self.backend, self.stabilizer)
        return RelevancePropagation(states, rules, chosen.gradient, self.prefix is None)

    def _error_method(self, reliability: str, chosen: Variant, batch: Mapping[str, Any]) -> str | None:
        if reliability == "off" or chosen.kind not in FOLLOWED:
            return None
        if reliability != "auto":
            return reliability
        # A second run is cheap where the host limits the speed. In a CUDA graph it would double the time.
        if not may_look() or torch.float64 in (self.dtype, self.stock.dtype):
            return "estimated"
        # The estimate is too coarse for trained image models; docs/transformer_attribution.md has figures.
        small = measured(self.weights * self._tokens(batch), self.stock.device)
        return "measured" if small or self.prefix is not None else "estimated"

    def _tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of tokens of a batch, including padding and the tokens before the patches."""
        if self.prefix is None:
            ids = batch.get("input_ids")
            return batch["inputs_embeds"][..., 0].numel() if ids is None else ids.numel()
        pixels, step = batch["pixel_values"], vit.patch_projection(self.stock.base_model).stride
        return len(pixels) * (self.prefix + (pixels.shape[2] // step[0]) * (pixels.shape[3] // step[1]))

    def _variant(self, variant: str, start_layer: int, maps: Sequence[str], reliability: str) -> Variant:
        name, depth = PUBLISHED.get(variant, variant), self.depth
        if name not in VARIANTS:
            raise ValueError(
                f"TransformerAttribution: variant must be one of {', '.join(VARIANTS)}, got {variant!r}"
            )
        check_start_layer(WHO, start_layer, depth)
        check_maps("TransformerAttribution", maps, MAPS)
        if reliability not in MODES:
            raise ValueError(
                f"TransformerAttribution: reliability must be one of {', '.join(MODES)}, got {reliability!r}"
            )
        chosen = VARIANTS[name]
        if chosen.layer is not None and chosen.layer >= depth:
            raise ValueError(
                f"TransformerAttribution: {variant} needs {chosen.layer + 1} layers, the model has {depth}"
            )
        return chosen

    def _check(self, batch: Mapping[str, Any]) -> None:
        if self.prefix is None and self.has_choices(batch):
            batch = {
                name: value.flatten(0, 1) if isinstance(value, Tensor) and value.dim() > 2 else value
                for name, value in batch.items()
            }
        check_batch("TransformerAttribution", self.model, batch)

    @staticmethod
    def has_choices(batch: Mapping[str, Any]) -> bool:
        """Return whether each example has several texts, (B, choices, n), each with its own logit."""
        return any(
            isinstance(t := batch.get(name), Tensor) and t.dim() == dim
            for name, dim in (("input_ids", 3), ("inputs_embeds", 4))
        )

    def _one_choice(
        self, batch: Mapping[str, Any], target: Any, contrast: Index
    ) -> tuple[dict[str, Any], int, None]:
        """Return the batch with only the explained choice, whose logit depends on its own text alone.

        The inputs (B, choices, n) become (B, 1, n). Also returned are target 0 and contrast None.
        """
        if contrast is not None:
            raise ValueError(
                "TransformerAttribution: contrast needs classes of one input; the choices are different "
                "inputs"
            )
        inputs = {
            name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() > 2
        }
        first = next(iter(inputs.values()))
        if target is None:
            with torch.no_grad(), callers_autocast():
                target = find_logits(run_model(self.model, batch)).argmax(-1)
        index = integers("TransformerAttribution", "target", target, first.device)
        if index.shape not in ((), (1,), (first.shape[0],)):
            raise ValueError(
                f"TransformerAttribution: target must be one choice or one for each of {first.shape[0]} "
                f"examples, got shape {tuple(index.shape)}"
            )
        index = index.expand(first.shape[0])
        if int(index.min()) < 0 or int(index.max()) >= first.shape[1]:
            raise ValueError(
                f"TransformerAttribution: target must lie in [0, {first.shape[1]}), the choices, got "
                f"{index.tolist()}"
            )
        rows = torch.arange(first.shape[0], device=first.device)
        return {**batch, **{name: value[rows, index][:, None] for name, value in inputs.items()}}, 0, None

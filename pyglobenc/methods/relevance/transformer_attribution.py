"""Transformer attribution: relevance times attention gradients, rolled out (Chefer, Gur and Wolf, CVPR 2021),
and its variants.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import callers_autocast, outside_autocast
from pyglobenc.common.deferred import may_look
from pyglobenc.hf import find_layers
from pyglobenc.hf.architectures import vit
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.arguments import model_inputs, packed_inputs, run_model
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.inputs import check_batch, check_model
from pyglobenc.methods.packing import Packed, pack
from pyglobenc.methods.precision.relevance_error import ObservedRules
from pyglobenc.methods.precision.reliability import (
    METHODS,
    distance,
    known,
    measured,
    warn_of_nothing,
    warn_of_precision,
)
from pyglobenc.methods.relevance.propagation import MAPS, RelevancePropagation
from pyglobenc.methods.relevance.result import RelevanceResult, add_layers, of_sequences, relevance_result
from pyglobenc.methods.relevance.rules import LrpRules, Rules
from pyglobenc.methods.relevance.states import States, run_forward
from pyglobenc.methods.relevance.target import Index
from pyglobenc.methods.relevance.variants import FOLLOWED, PUBLISHED, VARIANTS, Variant, variant_scores

WHO = "TransformerAttribution"


class TransformerAttribution:
    """Transformer attribution of a transformers classifier: BERT and its relatives, DistilBERT, ViT, DeiT.

    The head is what the logit is computed with, in the model or in a user's module around it: a chain of
    Linear modules, activations and layer norms that reads one token, or the sum or mean of several. Every
    call checks that; other heads are refused.

    Args:
        model: a known architecture with a head, or a module with a head of its own around one, in evaluation
            mode; left as it is.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: of the arithmetic; None is float32, or float64 for a float64 model. torch.float64 runs the
            forward pass and the relevance in double on a narrower model, weight by weight, without a second
            copy of it.
        stabilizer: 0 for the published guard of the divisions; e > 0 replaces it, where a sum of both signs
            is divided by, by b + e * sign(b).

    Raises:
        TypeError, ValueError: unknown architecture or backend, training mode.

    Source: Chefer et al., 2021, and its published code, whose guards are kept to the letter.
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
        # the transformers model in it
        self.stock = stock_model(model)
        self.depth = len(found := find_layers(model))
        self.weights = sum(p.numel() for layer in found for p in layer.block.parameters())
        images = self.stock.config.model_type in vit.MODEL_TYPES
        # tokens before the patches of an image; None for text
        self.prefix = len(vit.prefix_tokens(self.stock.base_model)) if images else None
        # what makes a call's rules, unless its variant has its own
        self.rules = Rules
        self.backend = backend
        self.stabilizer = stabilizer

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
        """Attribute one logit of every example to its tokens or patches; no (n, n) array is stored unless
        maps asks for one.

        Args:
            target: class explained, one or (B,), None: the predicted one; a question answerer's "start"
                (default) or "end"; a choice.
            contrast: class whose logit is subtracted, one or (B,): the difference is explained as one output.
            position: token whose logit is explained, one or (B,), for heads with a logit a token; of a
                question answerer by default the one with the largest logit.
            start_layer: first layer of the rollout; the published BERT code's default is 11, its notebook's
                and ViT's 0.
            variant: a name in VARIANTS or PUBLISHED, see `relevance_variants`.
            layers: also return the relevance of every layer's input.
            maps: any of "map" (B, L, n, n), the matrix A that the rollout adds to the identity; "alpha",
                "R_alpha", "grad_alpha" (B, L, H, n, n); "R_in" (B, L, n, d).
            reliability: how `error` is found, see `reliability`: "measured" up to doubles the time,
                "estimated" costs little, "auto" measures small inputs and estimates the others; "off". A
                PrecisionWarning is given above 1e-2 and where it is unknown (NaN); a NoRelevanceWarning where
                no token gets any relevance and the scores are 0.
            batch: the model's inputs, as its tokenizer or image processor returns them and `GlobEnc` takes
                them.

        Returns:
            RelevanceResult. scores are the published ones before the pooled token's own entry is overwritten;
            every example's are what it gets alone, without padding.

        Raises:
            TypeError, ValueError: unknown variant or map, an index out of range, input that the model can't
                take, a head that the relevance rules don't cover, a result or a logit that isn't finite (the
                error names the parameter that holds NaN or infinity).
        """
        batch = model_inputs("TransformerAttribution", self.model, batch, TransformerAttribution.__call__)
        chosen = self._variant(variant, start_layer, maps, reliability)
        self._check(batch)
        if self.has_choices(batch):
            batch, target, contrast = self._one_choice(batch, target, contrast)
        how = self._error_method(reliability, chosen, batch)
        return self._attribute(batch, (target, contrast, position), chosen, start_layer, layers, maps, how)

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
        """Attribute the class of sequences of any lengths, packed into one so that nothing is spent on
        padding.

        Args:
            target, contrast: classes, one or (S,), as for a batch.
            start_layer, layers: as for a batch.
            variant: one that follows relevance; those that only read attention take padded batches.
            reliability: "measured" or "off"; "auto" measures small inputs and leaves the error of others out.
            batch: the inputs of S sequences, a list of each one's, as the model's tokenizer returns them
                unasked for padding or tensors.

        Returns:
            What each sequence gives alone: S results of batch size 1, in order.

        Raises:
            TypeError, ValueError: as for a batch, or a model without one set of logits for a sequence, or
                that can't be given packed ones.
        """
        who, chosen = "TransformerAttribution", self._variant(variant, start_layer, (), reliability)
        batch = packed_inputs(who, batch, TransformerAttribution.packed)
        if chosen.kind not in FOLLOWED:
            raise ValueError(f"{who}: {variant} reads attention alone, and no packed sequences")
        if reliability == "estimated":
            raise ValueError(
                f"{who}: the error of packed sequences can be 'measured', or 'off', not estimated"
            )
        with torch.inference_mode(False):
            packed = pack(who, self.model, batch)
        explained = (*(_in_order(index, packed.order) for index in (target, contrast)), None)
        how = self._error_method(reliability, chosen, packed.inputs)
        whole = self._attribute(
            packed, explained, chosen, start_layer, layers, (), None if how == "estimated" else how
        )
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
        """Of a checked batch, or of packed sequences as one; explained: target, contrast and position."""
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
        # a graph, within which nothing is looked at, has no host that a second run could hide behind
        cheap = may_look() and torch.float64 not in (self.dtype, self.stock.dtype)
        return (
            "measured"
            if cheap and measured(self.weights * self._tokens(batch), self.stock.device)
            else "estimated"
        )

    def _tokens(self, batch: Mapping[str, Any]) -> int:
        """Tokens of a batch, padding and those before an image's patches among them."""
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
        if isinstance(start_layer, bool) or not isinstance(start_layer, int):
            raise TypeError(f"TransformerAttribution: start_layer must be an integer, got {start_layer!r}")
        if not 0 <= start_layer < depth:
            raise ValueError(
                f"TransformerAttribution: start_layer must lie in [0, {depth}), the model's layers, got "
                f"{start_layer}"
            )
        if isinstance(maps, str) or not set(maps) <= set(MAPS):
            raise ValueError(
                f"TransformerAttribution: maps must be a sequence of names among {', '.join(MAPS)}, got "
                f"{maps!r}"
            )
        if reliability not in METHODS:
            raise ValueError(
                f"TransformerAttribution: reliability must be one of {', '.join(METHODS)}, got "
                f"{reliability!r}"
            )
        chosen = VARIANTS[name]
        if chosen.layer is not None and chosen.layer >= depth:
            raise ValueError(
                f"TransformerAttribution: {variant} needs {chosen.layer + 1} layers, the model has {depth}"
            )
        return chosen

    def _check(self, batch: Mapping[str, Any]) -> None:
        who = "TransformerAttribution"
        if self.prefix is None:
            choices = self.has_choices(batch)
            flat = {
                k: v.flatten(0, 1) if choices and isinstance(v, Tensor) and v.dim() > 2 else v
                for k, v in batch.items()
            }
            check_batch(who, self.model, flat)
            return
        if self.model.training or self.stock.training:
            raise ValueError(
                f"{who}: the model is in training mode, where dropout changes the result; call model.eval() "
                f"first"
            )
        pixels = batch.get("pixel_values")
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or 0 in pixels.shape:
            came = (
                "nothing"
                if pixels is None
                else tuple(pixels.shape)
                if isinstance(pixels, Tensor)
                else type(pixels).__name__
            )
            raise ValueError(f"{who}: pixel_values must be a tensor (B, channels, height, width), got {came}")

    @staticmethod
    def has_choices(batch: Mapping[str, Any]) -> bool:
        """Whether each example is several texts, (B, choices, n), each with a logit of its own."""
        return any(
            isinstance(t := batch.get(name), Tensor) and t.dim() == dim
            for name, dim in (("input_ids", 3), ("inputs_embeds", 4))
        )

    def _one_choice(
        self, batch: Mapping[str, Any], target: Any, contrast: Index
    ) -> tuple[dict[str, Any], int, None]:
        """The batch cut to the choice explained: a choice's logit depends on its own text alone."""
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
        index = torch.as_tensor(target, device=first.device).expand(first.shape[0])
        if int(index.min()) < 0 or int(index.max()) >= first.shape[1]:
            raise ValueError(
                f"TransformerAttribution: target must lie in [0, {first.shape[1]}), the choices, got "
                f"{index.tolist()}"
            )
        rows = torch.arange(first.shape[0], device=first.device)
        return {**batch, **{name: value[rows, index][:, None] for name, value in inputs.items()}}, 0, None


def _in_order(index: Any, order: list[int]) -> Any:
    """One class for each sequence as they are packed; one for all as it is."""
    if index is None or isinstance(index, str):
        return index
    index = torch.as_tensor(index)
    return index[order] if index.shape == (len(order),) else index

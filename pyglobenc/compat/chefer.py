"""The classes of the published Transformer-Explainability code, on stock models and any device.

Each import replaces one of the published code (Chefer, Gur and Wolf, CVPR 2021):

    # BERT_explainability.modules.BERT.ExplanationGenerator
    from pyglobenc.compat.chefer import Generator
    # baselines.ViT.ViT_explanation_generator
    from pyglobenc.compat.chefer import LRP, Baselines
    # baselines.ViT.ViT_LRP
    from pyglobenc.compat.chefer import vit_base_patch16_224

A batch may hold more than one example.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyglobenc.backends.shared.relevance_tiles import probability_tiles

# Scripts import the classifiers from here.
from pyglobenc.common.integers import integers
from pyglobenc.compat.chefer_models import (  # noqa: F401
    BaselineVisionTransformer,
    BertForClsOrigLrp,
    OrigVisionTransformer,
    VisionTransformer,
    deit_base_patch16_224,
    vit_base_patch16_224,
    vit_large_patch16_224,
    vit_new_base_patch16_224,
    vit_orig_base_patch16_224,
)
from pyglobenc.hf import LayerTrace
from pyglobenc.hf.architectures.vit import patch_projection
from pyglobenc.methods.inputs import check_batch
from pyglobenc.methods.relevance.rules import LrpRules
from pyglobenc.methods.relevance.states import run_forward
from pyglobenc.methods.relevance.transformer_attribution import TransformerAttribution

# The published method names, and the variants that they compute.
VARIANT_OF = {
    "transformer_attribution": "transformer_attribution",
    "grad": "transformer_attribution",
    "rollout": "rollout",
    "full": "full",
    "last_layer": "last_layer",
    "last_layer_attn": "last_layer_attn",
    "second_layer": "second_layer",
}
WITH_ABLATION = ("last_layer", "second_layer")


class _Explainer:
    """Explains a model, which is put into evaluation mode, with the rules that its class asks for."""

    def __init__(self, model: PreTrainedModel, backend: str = "auto"):
        if isinstance(model, nn.Module):
            model.eval()
        self._attribute = TransformerAttribution(model, backend)
        self.model = model
        if getattr(model, "lrp_baseline", False):
            self._attribute.rules = LrpRules


class Generator(_Explainer):
    """Explains a BERT classifier. Each method returns scores of the tokens, (B, n).

    The methods take input_ids and attention_mask, (B, n), and index, the class explained: one for all
    examples, (B,), or None for the predicted class. As in the published code, `generate_LRP` sets the first
    token's score to the smallest one, and the other methods set it to 0.
    """

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Return the output of the model."""
        return self.model(input_ids, attention_mask)

    def generate_LRP(
        self, input_ids: Tensor, attention_mask: Tensor, index: Any = None, start_layer: int = 11
    ) -> Tensor:
        """Return transformer attribution, (B, n).

        start_layer is the lowest layer of the rollout. The default, 11, is the last layer of BERT-base.
        """
        scores = self._scores("transformer_attribution", input_ids, attention_mask, index, start_layer)
        scores[:, 0] = scores.amin(1)
        return scores

    def generate_LRP_last_layer(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Return the first token's row of the relevance map of the last layer, (B, n)."""
        return self._without_first("last_layer", input_ids, attention_mask, index)

    def generate_full_lrp(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Return the relevance propagated down to the input tokens, (B, n)."""
        return self._without_first("full", input_ids, attention_mask, index)

    def generate_attn_last_layer(
        self, input_ids: Tensor, attention_mask: Tensor, index: Any = None
    ) -> Tensor:
        """Return the first token's row of the last layer's attention, (B, n)."""
        return self._without_first("last_layer_attn", input_ids, attention_mask, index)

    def generate_rollout(
        self, input_ids: Tensor, attention_mask: Tensor, start_layer: int = 0, index: Any = None
    ) -> Tensor:
        """Return attention rollout, (B, n)."""
        return self._without_first("attention_rollout", input_ids, attention_mask, index, start_layer)

    def generate_attn_gradcam(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Return Grad-CAM on the last layer's attention, (B, n).

        As in the published code, means and extremes include padding.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        check_batch("Generator", self._attribute.model, batch)
        target = (_class(index, self._attribute), None, None)
        last = self.model.config.num_hidden_layers - 1
        states = run_forward(self._attribute.model, batch, target, None, last)
        scores = _grad_cam(states.layers[-1], states.grads[-1])
        scores[:, 0] = 0
        return scores

    def _without_first(
        self, variant: str, input_ids: Tensor, attention_mask: Tensor, index: Any, start_layer: int = 0
    ) -> Tensor:
        scores = self._scores(variant, input_ids, attention_mask, index, start_layer)
        scores[:, 0] = 0
        return scores

    def _scores(
        self, variant: str, input_ids: Tensor, attention_mask: Tensor, index: Any, start_layer: int
    ) -> Tensor:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._attribute(
            **batch, target=_class(index, self._attribute), variant=variant, start_layer=start_layer
        ).scores.clone()


class LRP(_Explainer):
    """Explains a ViT or DeiT classifier."""

    def generate_LRP(
        self,
        input: Tensor,
        index: Any = None,
        method: str = "transformer_attribution",
        is_ablation: bool = False,
        start_layer: int = 0,
    ) -> Tensor:
        """Return the relevance of patches or pixels.

        Args:
            input: images, (B, channels, height, width).
            index: the class explained, one for all images or (B,); None means the predicted class.
            method: "transformer_attribution" (or its earlier name "grad"), "rollout", "full", "last_layer",
                "last_layer_attn", "second_layer".
            is_ablation: multiply the map of "last_layer" or "second_layer" by the gradient.
            start_layer: the lowest layer of a rollout.

        Returns:
            (B, patches) for "transformer_attribution" and "rollout", and (B, height, width) for "full". The
            other methods give (patches,) for one image and (B, patches) for several.

        Raises:
            ValueError: the method is unknown.
        """
        if method not in VARIANT_OF:
            raise ValueError(f"LRP: method must be one of {', '.join(VARIANT_OF)}, got {method!r}")
        variant = VARIANT_OF[method] + ("_ablation" if is_ablation and method in WITH_ABLATION else "")
        scores = self._attribute(
            pixel_values=input,
            target=_class(index, self._attribute),
            variant=variant,
            start_layer=start_layer,
        ).scores
        return (
            scores if VARIANT_OF[method] in ("transformer_attribution", "rollout", "full") else _one(scores)
        )


class Baselines(_Explainer):
    """Attention baselines for a ViT or DeiT classifier."""

    def generate_cam_attn(self, input: Tensor, index: Any = None) -> Tensor:
        """Return Grad-CAM on the last layer's attention, one value for each patch.

        Args:
            input: images, (B, channels, height, width).
            index: the class explained, one for all images or (B,); None means the predicted class.

        Returns:
            (rows, columns) for one image, (B, rows, columns) for several.
        """
        scores = self._attribute(
            pixel_values=input, target=_class(index, self._attribute), variant="attn_gradcam"
        ).scores
        rows = input.shape[2] // patch_projection(self.model.base_model).stride[0]
        return _one(scores.unflatten(1, (rows, -1)))

    def generate_rollout(self, input: Tensor, start_layer: int = 0) -> Tensor:
        """Return attention rollout, (B, patches), of images (B, channels, height, width)."""
        return self._attribute(
            pixel_values=input, variant="attention_rollout", start_layer=start_layer
        ).scores


def _grad_cam(layer: LayerTrace, grad_o: Tensor) -> Tensor:
    """Return the first token's row of Grad-CAM on attention, (B, n).

    The map is scaled to [0, 1] over all its entries, including padding.
    """
    n = layer.q.shape[2]
    weights = (grad_o.sum(2) * layer.v.sum(2)).sum(-1)[..., None, None] / n**2
    tiles = probability_tiles(layer.q, layer.k, layer.lse, layer.key_mask, layer.scaling, layer.window)
    maps = [(alpha * weights).mean(1).clamp(min=0) for *_, alpha in tiles]
    low = torch.stack([m.amin((1, 2)) for m in maps]).amin(0)[:, None]
    high = torch.stack([m.amax((1, 2)) for m in maps]).amax(0)[:, None]
    return (maps[0][:, 0] - low) / (high - low)


def _class(index: Any, attribute: TransformerAttribution) -> Any:
    """Return the class, one or (B,), as a tensor, or None for None.

    As in the published code, numpy integers are accepted and negative classes count from the last one.
    """
    if index is None:
        return None
    index = integers("compat", "target", index)
    index = torch.where(index < 0, index + attribute.model.config.num_labels, index)
    return index.reshape(()) if index.numel() == 1 else index


def _one(t: Tensor) -> Tensor:
    """Drop the batch axis of a single image, as the published code does."""
    return t[0] if t.shape[0] == 1 else t

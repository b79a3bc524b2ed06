"""The published Transformer-Explainability code's classes (Chefer, Gur and Wolf, CVPR 2021), on stock models
and any device.

    from pyglobenc.compat.chefer import Generator              # instead of
    BERT_explainability...ExplanationGenerator from pyglobenc.compat.chefer import LRP, Baselines         #
    instead of baselines.ViT.ViT_explanation_generator from pyglobenc.compat.chefer import
    vit_base_patch16_224   # instead of baselines.ViT.ViT_LRP

Batches may hold more than one example.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BertForSequenceClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from pyglobenc.backends.shared.relevance_tiles import probability_tiles
from pyglobenc.hf import LayerTrace, find_layers
from pyglobenc.hf.architectures.vit import patch_projection
from pyglobenc.methods.inputs import check_batch
from pyglobenc.methods.relevance.rules import LrpRules
from pyglobenc.methods.relevance.states import run_forward
from pyglobenc.methods.relevance.transformer_attribution import TransformerAttribution

# the published method names, and what they are with is_ablation
METHODS = {
    "transformer_attribution": "transformer_attribution",
    "grad": "transformer_attribution",
    "rollout": "rollout",
    "full": "full",
    "last_layer": "last_layer",
    "last_layer_attn": "last_layer_attn",
    "second_layer": "second_layer",
}
WITH_ABLATION = ("last_layer", "second_layer")


class VisionTransformer(ViTForImageClassification):
    """Stock ViT classifier with the LayerNorms of ViT_LRP, whose call on images alone returns their
    logits.
    """

    last_eps = 1e-5

    def __init__(self, config: ViTConfig):
        config.layer_norm_eps = 1e-6
        super().__init__(config)
        self.vit.layernorm.eps = self.last_eps

    def forward(self, images: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits (B, classes) of images (B, channels, height, width); with the stock model's keywords its
        output.
        """
        return super().forward(**kwargs) if images is None else super().forward(images).logits

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Load weights under transformers' names, or under the published code's, which are timm's."""
        weights = _stock_names(self, state_dict) if "pos_embed" in state_dict else state_dict
        return super().load_state_dict(weights, *args, **kwargs)


class BaselineVisionTransformer(VisionTransformer):
    """The same with the last LayerNorm of ViT_new, which the published scripts give to `Baselines`."""

    last_eps = 1e-6


class OrigVisionTransformer(VisionTransformer):
    """The classifier of ViT_LRP, explained by the LRP baseline's rules, as published in ViT_orig_LRP."""

    lrp_baseline = True


class BertForClsOrigLrp(BertForSequenceClassification):
    """Stock BERT classifier, explained by the LRP baseline's rules, as published in BERT_cls_lrp."""

    lrp_baseline = True


def vit_base_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> VisionTransformer:
    """ViT-Base for 224 x 224 images, with random weights or those of google/vit-base-patch16-224."""
    return _vit(VisionTransformer, "google/vit-base-patch16-224", pretrained, num_classes)


def vit_large_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> VisionTransformer:
    """ViT-Large, with random weights or those of google/vit-large-patch16-224."""
    return _vit(VisionTransformer, "google/vit-large-patch16-224", pretrained, num_classes)


def deit_base_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> VisionTransformer:
    """ViT-Base with random weights or those of facebook/deit-base-patch16-224."""
    return _vit(VisionTransformer, "facebook/deit-base-patch16-224", pretrained, num_classes)


def vit_new_base_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> BaselineVisionTransformer:
    """`vit_base_patch16_224` of ViT_new."""
    return _vit(BaselineVisionTransformer, "google/vit-base-patch16-224", pretrained, num_classes)


def vit_orig_base_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> OrigVisionTransformer:
    """`vit_base_patch16_224` of ViT_orig_LRP."""
    return _vit(OrigVisionTransformer, "google/vit-base-patch16-224", pretrained, num_classes)


class Generator:
    """Explanations of a BERT classifier, (B, n) each; index is the class explained, None the predicted
    one.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto"):
        self.model = model
        self.model.eval()
        self._attribute = _attribution(model, backend)
        self._last = model.config.num_hidden_layers - 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The model's own output."""
        return self.model(input_ids, attention_mask)

    def generate_LRP(
        self, input_ids: Tensor, attention_mask: Tensor, index: Any = None, start_layer: int = 11
    ) -> Tensor:
        """Transformer attribution, the pooled token's own entry set to the row's smallest; start_layer 11 is
        the last of BERT-base.
        """
        scores = self._scores("transformer_attribution", input_ids, attention_mask, index, start_layer)
        scores[:, 0] = scores.amin(1)
        return scores

    def generate_LRP_last_layer(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Relevance map of the last layer."""
        return self._without_first("last_layer", input_ids, attention_mask, index)

    def generate_full_lrp(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Relevance propagated down to the input tokens."""
        return self._without_first("full", input_ids, attention_mask, index)

    def generate_attn_last_layer(
        self, input_ids: Tensor, attention_mask: Tensor, index: Any = None
    ) -> Tensor:
        """Attention of the last layer."""
        return self._without_first("last_layer_attn", input_ids, attention_mask, index)

    def generate_rollout(
        self, input_ids: Tensor, attention_mask: Tensor, start_layer: int = 0, index: Any = None
    ) -> Tensor:
        """Attention rollout."""
        return self._without_first("attention_rollout", input_ids, attention_mask, index, start_layer)

    def generate_attn_gradcam(self, input_ids: Tensor, attention_mask: Tensor, index: Any = None) -> Tensor:
        """Grad-CAM on the last layer's attention; as published, means and extremes run over padding too."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        check_batch("Generator", self._attribute.model, batch)
        target = (_class(index, self._attribute), None, None)
        states = run_forward(self._attribute.model, batch, target, None, self._last)
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


class LRP:
    """Explanations of a ViT or DeiT classifier; index is the class explained, None the predicted one."""

    def __init__(self, model: PreTrainedModel, backend: str = "auto"):
        self.model = model
        self.model.eval()
        self._attribute = _attribution(model, backend)

    def generate_LRP(
        self,
        input: Tensor,
        index: Any = None,
        method: str = "transformer_attribution",
        is_ablation: bool = False,
        start_layer: int = 0,
    ) -> Tensor:
        """Relevance of patches or pixels.

        Args:
            input: images (B, channels, height, width).
            index: class, one or (B,), or None.
            method: "transformer_attribution" (or its earlier name "grad"), "rollout", "full", "last_layer",
                "last_layer_attn", "second_layer".
            is_ablation: of "last_layer" and "second_layer": times the gradient.
            start_layer: first layer of a rollout.

        Returns:
            (B, patches) of the rollouts; (B, height, width) of "full"; (patches,) of the others, (B, patches)
            for more than one image.

        Raises:
            ValueError: unknown method.
        """
        if method not in METHODS:
            raise ValueError(f"LRP: method must be one of {', '.join(METHODS)}, got {method!r}")
        variant = METHODS[method] + ("_ablation" if is_ablation and method in WITH_ABLATION else "")
        scores = self._attribute(
            pixel_values=input,
            target=_class(index, self._attribute),
            variant=variant,
            start_layer=start_layer,
        ).scores
        return scores if METHODS[method] in ("transformer_attribution", "rollout", "full") else _one(scores)


class Baselines:
    """Attention baselines of a ViT or DeiT classifier."""

    def __init__(self, model: PreTrainedModel, backend: str = "auto"):
        self.model = model
        self.model.eval()
        self._attribute = _attribution(model, backend)

    def generate_cam_attn(self, input: Tensor, index: Any = None) -> Tensor:
        """Grad-CAM on the last layer's attention, a value a patch, (rows, columns), or (B, rows, columns) for
        more than one image.
        """
        scores = self._attribute(
            pixel_values=input, target=_class(index, self._attribute), variant="attn_gradcam"
        ).scores
        rows = input.shape[2] // patch_projection(self.model.base_model).stride[0]
        return _one(scores.unflatten(1, (rows, -1)))

    def generate_rollout(self, input: Tensor, start_layer: int = 0) -> Tensor:
        """Attention rollout, (B, patches)."""
        return self._attribute(
            pixel_values=input, variant="attention_rollout", start_layer=start_layer
        ).scores


def _vit(cls: type[VisionTransformer], name: str, pretrained: bool, num_classes: int) -> Any:
    if pretrained:
        # as published, a head of another size is left random
        return cls.from_pretrained(name, num_labels=num_classes, ignore_mismatched_sizes=True)
    large = (
        dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        if "large" in name
        else {}
    )
    return cls(ViTConfig(num_labels=num_classes, **large)).eval()


def _stock_names(model: VisionTransformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the published class under the model's names; one that has no place here keeps its own."""
    names = {module: name for name, module in model.named_modules()}
    embeddings = names[model.vit.embeddings]
    tokens = {"cls_token": f"{embeddings}.cls_token", "pos_embed": f"{embeddings}.position_embeddings"}
    parts = {
        "patch_embed.proj": (patch_projection(model.vit),),
        "norm": (model.vit.layernorm,),
        "head": (model.classifier,),
    }
    for index, m in enumerate(find_layers(model)):
        block = {
            "norm1": (m.attention_norm,),
            "attn.qkv": (m.query, m.key, m.value),
            "attn.proj": (m.output,),
        }
        block |= {"norm2": (m.output_norm,), "mlp.fc1": (m.intermediate,), "mlp.fc2": (m.mlp_output,)}
        parts |= {f"blocks.{index}.{name}": modules for name, modules in block.items()}
    out = {}
    for name, value in weights.items():
        part, _, kind = name.rpartition(".")
        modules = parts.get(part)
        if modules is None:
            out[tokens.get(name, name)] = value
        else:
            out |= {
                f"{names[module]}.{kind}": rows
                for module, rows in zip(modules, value.chunk(len(modules)), strict=True)
            }
    return out


def _attribution(model: PreTrainedModel, backend: str) -> TransformerAttribution:
    """Attribution of a model by its class's rules."""
    attribute = TransformerAttribution(model, backend)
    if getattr(model, "lrp_baseline", False):
        attribute.rules = LrpRules
    return attribute


def _grad_cam(layer: LayerTrace, grad_o: Tensor) -> Tensor:
    """Row of the first token of Grad-CAM on attention, scaled to [0, 1] over the whole map, padding included:
    (B, n).
    """
    n = layer.q.shape[2]
    weights = (grad_o.sum(2) * layer.v.sum(2)).sum(-1)[..., None, None] / n**2
    tiles = probability_tiles(layer.q, layer.k, layer.lse, layer.key_mask, layer.scaling, layer.window)
    maps = [(alpha * weights).mean(1).clamp(min=0) for _, _, alpha in tiles]
    low = torch.stack([m.amin((1, 2)) for m in maps]).amin(0)[:, None]
    high = torch.stack([m.amax((1, 2)) for m in maps]).amax(0)[:, None]
    return (maps[0][:, 0] - low) / (high - low)


def _class(index: Any, attribute: TransformerAttribution) -> Any:
    """None, or one class or (B,) as integers; the published code also takes numpy's, and counts negative ones
    from the last class.
    """
    if index is None:
        return None
    index = torch.as_tensor(index)
    index = torch.where(index < 0, index + attribute.model.config.num_labels, index)
    return index.reshape(()) if index.numel() == 1 else index


def _one(t: Tensor) -> Tensor:
    """The published code drops the batch, of which it takes one."""
    return t[0] if t.shape[0] == 1 else t

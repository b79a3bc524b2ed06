"""The classifiers of the published Transformer-Explainability code, as stock models of transformers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import BertForSequenceClassification, ViTConfig, ViTForImageClassification

from pyglobenc.hf import find_layers
from pyglobenc.hf.architectures.vit import patch_projection


class VisionTransformer(ViTForImageClassification):
    """A stock ViT classifier with the LayerNorm constants of ViT_LRP.

    Called on images alone, it returns the logits as the published class does.
    """

    last_eps = 1e-5

    def __init__(self, config: ViTConfig):
        config.layer_norm_eps = 1e-6
        super().__init__(config)
        self.vit.layernorm.eps = self.last_eps

    def forward(self, images: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the logits (B, classes) of images (B, channels, height, width).

        Without images, the keywords are those of the stock model, and its output is returned.
        """
        return super().forward(**kwargs) if images is None else super().forward(images).logits

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Load weights with the names of transformers, or with those of the published code and timm."""
        weights = _stock_names(self, state_dict) if "pos_embed" in state_dict else state_dict
        return super().load_state_dict(weights, *args, **kwargs)


class BaselineVisionTransformer(VisionTransformer):
    """The ViT classifier with the last LayerNorm of ViT_new, which published scripts use with `Baselines`."""

    last_eps = 1e-6


class OrigVisionTransformer(VisionTransformer):
    """The ViT classifier that is explained by the LRP baseline's rules, as published in ViT_orig_LRP."""

    lrp_baseline = True


class BertForClsOrigLrp(BertForSequenceClassification):
    """A stock BERT classifier that is explained by the LRP baseline's rules, as published in BERT_cls_lrp."""

    lrp_baseline = True


def vit_base_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> VisionTransformer:
    """Return a ViT-Base classifier for images (B, 3, 224, 224).

    Args:
        pretrained: download the weights of google/vit-base-patch16-224; otherwise they are random.
        num_classes: number of classes. A head of another size than the pretrained one gets random weights.
    """
    return _vit(VisionTransformer, "google/vit-base-patch16-224", pretrained, num_classes)


def vit_large_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> VisionTransformer:
    """Return a ViT-Large classifier for images (B, 3, 224, 224).

    The arguments are those of `vit_base_patch16_224`, with the weights of google/vit-large-patch16-224.
    """
    return _vit(VisionTransformer, "google/vit-large-patch16-224", pretrained, num_classes)


def deit_base_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> VisionTransformer:
    """Return a DeiT-Base classifier for images (B, 3, 224, 224).

    The arguments are those of `vit_base_patch16_224`, with the weights of facebook/deit-base-patch16-224.
    """
    return _vit(VisionTransformer, "facebook/deit-base-patch16-224", pretrained, num_classes)


def vit_new_base_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> BaselineVisionTransformer:
    """Return the ViT_new classifier for images (B, 3, 224, 224); arguments as `vit_base_patch16_224`."""
    return _vit(BaselineVisionTransformer, "google/vit-base-patch16-224", pretrained, num_classes)


def vit_orig_base_patch16_224(pretrained: bool = False, num_classes: int = 1000) -> OrigVisionTransformer:
    """Return the ViT_orig_LRP classifier for images (B, 3, 224, 224); arguments as `vit_base_patch16_224`."""
    return _vit(OrigVisionTransformer, "google/vit-base-patch16-224", pretrained, num_classes)


def _vit(cls: type[VisionTransformer], name: str, pretrained: bool, num_classes: int) -> Any:
    if pretrained:
        # As in the published code, a head of another size keeps its random weights.
        return cls.from_pretrained(name, num_labels=num_classes, ignore_mismatched_sizes=True)
    large = (
        dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        if "large" in name
        else {}
    )
    return cls(ViTConfig(num_labels=num_classes, **large)).eval()


def _stock_names(model: VisionTransformer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published class to the model's names. Unknown names stay unchanged."""
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

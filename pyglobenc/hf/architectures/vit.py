"""ViT and DeiT image encoders (pre-norm)."""

from torch import Tensor, nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("vit", "deit")


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        LayerModules(
            block=layer,
            attention=layer.attention,
            query=layer.attention.q_proj,
            key=layer.attention.k_proj,
            value=layer.attention.v_proj,
            output=layer.attention.o_proj,
            attention_norm=layer.layernorm_before,
            intermediate=layer.mlp.fc1,
            mlp_output=layer.mlp.fc2,
            output_norm=layer.layernorm_after,
            pre_norm=True,
        )
        for layer in base.layers
    ]


def patch_projection(base: nn.Module) -> nn.Conv2d:
    """Return the convolution that turns an image (B, C, height, width) into patch embeddings."""
    return base.embeddings.patch_embeddings.projection


def prefix_tokens(base: nn.Module) -> list[Tensor]:
    """Return the learned tokens before the patches, (1, 1, d) each: [CLS] and DeiT's distillation token."""
    tokens = [base.embeddings.cls_token]
    if hasattr(base.embeddings, "distillation_token"):
        tokens.append(base.embeddings.distillation_token)
    return tokens


def position_embeddings(base: nn.Module) -> Tensor:
    """Return the position embeddings (1, n, d) that are added to the tokens."""
    return base.embeddings.position_embeddings

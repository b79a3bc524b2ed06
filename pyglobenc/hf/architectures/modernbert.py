"""ModernBERT (pre-norm), with rotary positions and sliding windows in two of three layers."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("modernbert",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        LayerModules(
            block=layer,
            attention=layer.attn,
            output=layer.attn.Wo,
            attention_norm=layer.attn_norm,
            mlp_output=layer.mlp.Wo,
            output_norm=layer.mlp_norm,
            pre_norm=True,
        )
        for layer in base.layers
    ]

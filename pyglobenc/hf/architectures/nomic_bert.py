"""Nomic BERT (post-norm): a BERT with rotary positions and a gated MLP."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("nomic_bert",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        LayerModules(
            block=layer,
            attention=layer.self_attn,
            query=layer.self_attn.q_proj,
            key=layer.self_attn.k_proj,
            value=layer.self_attn.v_proj,
            output=layer.self_attn.o_proj,
            attention_norm=layer.post_attention_layernorm,
            mlp_output=layer.mlp.down_proj,
            output_norm=layer.post_mlp_layernorm,
        )
        for layer in base.layers
    ]

"""Phi-3 (pre-norm): a Llama that computes queries, keys and values in one projection."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("phi3",)
DECODER = True


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        LayerModules(
            block=layer,
            attention=layer.self_attn,
            output=layer.self_attn.o_proj,
            attention_norm=layer.input_layernorm,
            mlp_output=layer.mlp.down_proj,
            output_norm=layer.post_attention_layernorm,
            pre_norm=True,
        )
        for layer in base.layers
    ]

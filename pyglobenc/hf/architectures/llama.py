"""Llama (pre-norm) and decoders with the same module names: Mistral, Qwen2, Qwen3, Gemma."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
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
            query=layer.self_attn.q_proj,
            key=layer.self_attn.k_proj,
            value=layer.self_attn.v_proj,
            output=layer.self_attn.o_proj,
            attention_norm=layer.input_layernorm,
            mlp_output=layer.mlp.down_proj,
            output_norm=layer.post_attention_layernorm,
            pre_norm=True,
        )
        for layer in base.layers
    ]

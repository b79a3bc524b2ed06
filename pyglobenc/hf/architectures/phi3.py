"""Phi-3: a Llama whose queries, keys and values come from one projection."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("phi3",)
DECODER = True


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last; base is the model without its head."""
    return [
        LayerModules(
            block=layer,
            attention=layer.self_attn,
            query=None,
            key=None,
            value=None,
            output=layer.self_attn.o_proj,
            attention_norm=layer.input_layernorm,
            intermediate=None,
            mlp_output=layer.mlp.down_proj,
            output_norm=layer.post_attention_layernorm,
            pre_norm=True,
        )
        for layer in base.layers
    ]

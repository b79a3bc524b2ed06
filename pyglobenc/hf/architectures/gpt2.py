"""GPT-2 (pre-norm), which computes queries, keys and values in one module."""

from torch import nn

from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("gpt2",)
DECODER = True


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        LayerModules(
            block=layer,
            attention=layer.attn,
            output=layer.attn.c_proj,
            attention_norm=layer.ln_1,
            intermediate=layer.mlp.c_fc,
            mlp_output=layer.mlp.c_proj,
            output_norm=layer.ln_2,
            pre_norm=True,
        )
        for layer in base.h
    ]

"""Gemma 2 and 3, which have a norm before and a norm after both the attention and the MLP."""

from torch import nn

from pyglobenc.hf.architectures import llama
from pyglobenc.hf.trace.layers import LayerModules

MODEL_TYPES = ("gemma2", "gemma3_text")
DECODER = True


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        modules._replace(
            output_norm=modules.block.pre_feedforward_layernorm,
            added_norm=modules.block.post_attention_layernorm,
            unit_offset=True,
        )
        for modules in llama.layers(base)
    ]

"""MPNet (post-norm), whose attention modules compute attention themselves.

All layers share one bias of the scores, which depends on the head and on the distance j - i.
"""

from typing import Any

import torch
from torch import nn

from pyglobenc.backends.shared.score_mods import RelativeBias
from pyglobenc.common.deferred import may_look
from pyglobenc.hf.trace.layers import LayerModules, OwnScores

MODEL_TYPES = ("mpnet",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).
    """
    return [
        LayerModules(
            block=layer,
            attention=layer.attention.attn,
            query=layer.attention.attn.q,
            key=layer.attention.attn.k,
            value=layer.attention.attn.v,
            output=layer.attention.attn.o,
            attention_norm=layer.attention.LayerNorm,
            intermediate=layer.intermediate.dense,
            mlp_output=layer.output.dense,
            output_norm=layer.output.LayerNorm,
            own_scores=own_scores,
        )
        for layer in base.encoder.layer
    ]


def own_scores(module: nn.Module, arguments: dict[str, Any]) -> OwnScores:
    """Return what the module does to the scores q . k, read from the arguments of its forward pass.

    Args:
        module: an MPNetSelfAttention.
        arguments: by name; position_bias (B, H, n, n) or None, whose first row and column hold the bias of
            every distance; attention_mask (B, 1, 1, n) or None, 0 for real tokens and negative for padding.
    """
    bias, mask = arguments["position_bias"], arguments["attention_mask"]
    table = None if bias is None else torch.cat([bias[0, :, :, 0].flip(1), bias[0, :, 0, 1:]], dim=1)
    real = None if mask is None or (may_look() and not mask.any()) else mask[:, 0, 0] == 0
    return OwnScores(module.attention_head_size**-0.5, None if table is None else RelativeBias(table), real)

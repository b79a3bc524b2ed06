"""MPNet: computes its attention itself, with a bias for each head and distance that all layers share."""

from typing import Any

import torch
from torch import nn

from pyglobenc.backends.shared.score_mods import RelativeBias
from pyglobenc.common.deferred import may_look
from pyglobenc.hf.trace.layers import LayerModules, OwnScores

MODEL_TYPES = ("mpnet",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last; base is the model without its head."""
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
    """Arguments: position_bias (B, H, n, n), first row and column of which hold every distance;
    attention_mask (B, 1, 1, n), 0 if real.
    """
    bias, mask = arguments["position_bias"], arguments["attention_mask"]
    table = None if bias is None else torch.cat([bias[0, :, :, 0].flip(1), bias[0, :, 0, 1:]], dim=1)
    real = None if mask is None or (may_look() and not mask.any()) else mask[:, 0, 0] == 0
    return OwnScores(module.attention_head_size**-0.5, None if table is None else RelativeBias(table), real)

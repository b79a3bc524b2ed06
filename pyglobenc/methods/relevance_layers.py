"""Relevance through the head and through one transformer layer, in the published order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.hf import LayerTrace
from pyglobenc.methods.relevance_rules import Rules
from pyglobenc.methods.relevance_states import States


@dataclass
class Residual:
    """What waits beside the attention while relevance goes through it; tensors (B, n, d)."""

    layer: LayerTrace
    x: Tensor  # the layer's input
    r: Tensor  # relevance of the residual branch


def head_relevance(states: States, rules: Rules) -> Tensor:
    """Relevance of the last layer's output, (B, n, d): 1 at the explained logit, down the head, at the token that the head reads."""
    target, top = states.target, states.head[0]
    weight = top.weight.detach()
    row = weight[target.index].to(states.dtype)
    if target.contrast is not None:
        # the difference of two logits is one output whose weights are the difference
        row = row - weight[target.contrast].to(states.dtype)
    x = _at(states.take(top)[0], target.position)
    r = rules.logit(x, row)
    for module in states.head[1:]:
        given, returned = (_at(t, target.position)[:, None] for t in states.take(module))
        r = rules.linear(r[:, None], module, given, returned)[:, 0]
        x = given[:, 0]
    r = rules.clone([r[:, None]], x[:, None])
    last = states.layers[-1].x
    index = target.position[:, None, None].expand(-1, 1, last.shape[2])
    return torch.zeros_like(last).scatter_(1, index, r)


def _at(t: Tensor, position: Tensor) -> Tensor:
    """The tokens `position` (B,) of t (B, n, d); a t of (B, d) holds them already."""
    return t if t.dim() == 2 else t[torch.arange(t.shape[0], device=t.device), position]


def down_to_attention(states: States, index: int, r: Tensor, rules: Rules) -> tuple[Tensor, Residual]:
    """From a layer's output to its attention: s = R_o / safe(o), (B, H, n, dh), and the residual branch."""
    layer = states.layers[index]
    m = layer.modules
    _, mlp = states.take(m.mlp_output)
    merged, attended = states.take(m.output)
    # the MLP's residual: the tensor it reads after BERT's norm, before ViT's
    y = layer.x + attended if m.pre_norm else states.take(m.intermediate)[0]
    r_mlp, r_y = rules.add(r, mlp, y)
    for module in (m.mlp_output, m.intermediate):
        r_mlp = rules.linear(r_mlp, module, *states.take(module))
    r = rules.clone([r_mlp, r_y], y)
    r_attended, r_x = rules.add(r, attended, layer.x)
    r_o = rules.linear(r_attended, m.output, merged, attended)
    s = rules.over_output(_split(r_o, layer.q.shape[1]), layer.o)
    return s, Residual(layer, layer.x, r_x)


def below_attention(states: States, residual: Residual, parts: tuple[Tensor, Tensor, Tensor], rules: Rules) -> Tensor:
    """From the relevance of q, k and v, (B, H, n, dh) each, to that of the layer's input, (B, n, d)."""
    m = residual.layer.modules
    inputs = [
        rules.linear(_merge(part), module, *states.take(module)) for part, module in zip(parts, (m.query, m.key, m.value), strict=True)
    ]
    # before ViT's norm the published code has one Linear for all three, whose relevances add
    r = inputs[0] + inputs[1] + inputs[2] if m.pre_norm else rules.clone(inputs, residual.x)
    return rules.clone([r, residual.r], residual.x)


def _split(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(2, (heads, -1)).transpose(1, 2)


def _merge(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(2)

"""Propagates relevance through the head, through one transformer layer, and from a ViT's tokens to pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.backends.shared.safe_division import GUARD, safe_divide
from pyglobenc.hf import LayerTrace
from pyglobenc.hf.architectures.vit import patch_projection, position_embeddings, prefix_tokens
from pyglobenc.methods.relevance.head_chain import SumStep
from pyglobenc.methods.relevance.rules import Rules
from pyglobenc.methods.relevance.states import States


@dataclass
class Residual:
    """The residual branch beside a layer's attention.

    Attributes:
        layer: the captured layer.
        x: input of the layer, (B, n, d).
        r: relevance of the residual branch, (B, n, d).
    """

    layer: LayerTrace
    x: Tensor
    r: Tensor


def head_relevance(states: States, rules: Rules) -> Tensor:
    """Propagate relevance 1 from the explained logit down the head.

    Args:
        states: tensors of the forward pass.
        rules: the relevance rules.

    Returns:
        Relevance of the last layer's output, (B, n, d). It is 0 at tokens that the head does not read.

    Source: Chefer et al., 2021, eq. 5, and the IndexSelect and Clone modules of the published code.
    """
    head, top = states.head, states.head.steps[0]
    weight = top.module.weight.detach()
    row = weight[head.index.to(weight.device)].to(states.dtype)
    if head.contrast is not None:
        # The difference of two logits is one output whose weights are the difference of the two rows.
        row = row - weight[head.contrast.to(weight.device)].to(states.dtype)
    x = top.given
    r = rules.logit(x, row[:, None])
    for step in head.steps[1:]:
        if isinstance(step, SumStep):
            r = rules.token_sum(r, step.x, step.weights)
        else:
            x = step.given
            r = rules.linear(r, step.module, x, step.returned)
    last = states.layers[-1].x
    if head.position is None:
        return states.packed(r.to(last.device))
    r = rules.clone([r], x).to(last.device)
    index = states.pooled_index(last.device)[..., None].expand(-1, -1, last.shape[2])
    return torch.zeros_like(last).scatter_(1, index, r.view(index.shape))


def down_to_attention(states: States, index: int, r: Tensor, rules: Rules) -> tuple[Tensor, Residual]:
    """Propagate relevance from a layer's output to its attention output o.

    Args:
        states: tensors of the forward pass.
        index: number of the layer, from 0.
        r: relevance of the layer's output, (B, n, d).
        rules: the relevance rules.

    Returns:
        s = R_o / safe(o), (B, H, n, dh), and the residual branch beside the attention.

    Source: Chefer et al., 2021, eq. 5, 9 and 10, and the layer of the published code.
    """
    layer = states.layers[index]
    m = layer.modules
    _, mlp = states.input_output(m.mlp_output)
    merged, attended = states.input_output(m.output)
    # y is the residual of the MLP. BERT takes it after the norm, and ViT before the norm.
    y = layer.x + attended if m.pre_norm else states.input_output(m.intermediate)[0]
    r_mlp, r_y = rules.add(r, mlp, y, layer.cu_seqlens)
    for module in (m.mlp_output, m.intermediate):
        r_mlp = rules.linear(r_mlp, module, *states.input_output(module))
    r = rules.clone([r_mlp, r_y], y)
    r_attended, r_x = rules.add(r, attended, layer.x, layer.cu_seqlens)
    r_o = rules.linear(r_attended, m.output, merged, attended)
    return rules.over_output(r_o, layer), Residual(layer, layer.x, r_x)


def below_attention(states: States, residual: Residual, parts: Sequence[Tensor], rules: Rules) -> Tensor:
    """Propagate relevance from the queries, keys and values to the layer's input.

    Args:
        states: tensors of the forward pass.
        residual: the residual branch beside the attention.
        parts: relevance of the queries, keys and values, (B, n, d) each.
        rules: the relevance rules.

    Returns:
        Relevance of the layer's input, (B, n, d).

    Source: Chefer et al., 2021, eq. 5, and the Clone module of the published code.
    """
    m = residual.layer.modules
    inputs = [
        rules.linear(part, module, *states.input_output(module))
        for part, module in zip(parts, (m.query, m.key, m.value), strict=True)
    ]
    # The published ViT has one Linear module for q, k and v, so their relevances are added.
    r = rules.total(inputs) if m.pre_norm else rules.clone(inputs, residual.x)
    return rules.clone([r, residual.r], residual.x)


def pixel_relevance(model: PreTrainedModel, states: States, r: Tensor, rules: Rules) -> Tensor:
    """Propagate relevance from the first layer's input to the pixels.

    Args:
        model: a stock ViT or DeiT model.
        states: tensors of the forward pass.
        r: relevance of the first layer's input, (B, n, d).
        rules: the relevance rules.

    Returns:
        Relevance of each pixel, summed over the channels, (B, height, width).

    Raises:
        ValueError: the images do not have the size that the model was trained for.

    Source: the Conv2d and Add modules of the published code.
    """
    base = model.base_model
    convolution = patch_projection(base)
    pixels, patches = states.input_output(convolution)
    prefix = [t.detach().to(pixels.dtype).expand(len(pixels), -1, -1) for t in prefix_tokens(base)]
    tokens = torch.cat([*prefix, patches.flatten(2).transpose(1, 2)], dim=1)
    positions = position_embeddings(base).detach().to(pixels.dtype)
    if positions.shape[1] != tokens.shape[1]:
        raise ValueError(
            "TransformerAttribution: relevance of pixels needs the image size that the model was trained for"
        )
    r, _ = rules.add(r, tokens, positions.expand_as(tokens))
    r = r[:, len(prefix) :].transpose(1, 2).reshape_as(patches)
    return _convolution(r, pixels, convolution).sum(1)


def _convolution(r: Tensor, x: Tensor, module: torch.nn.Conv2d) -> Tensor:
    """Return the relevance of images x (B, C, height, width), from r, that of the convolution's output.

    With 3 channels this is the z^B rule with each image's smallest and largest value as bounds. With other
    numbers of channels it is the rule of a Linear layer.
    """
    weight = module.weight.detach().to(r.dtype)
    options = {"stride": module.stride, "padding": module.padding}
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)

    def forward(t: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(t, w, **options)

    def backward(t: Tensor, w: Tensor) -> Tensor:
        stride, kernel = module.stride[0], module.kernel_size[0]
        rest = x.shape[2] - ((t.shape[2] - 1) * stride - 2 * module.padding[0] + kernel)
        return F.conv_transpose2d(t, w, output_padding=rest, **options)

    if x.shape[1] == 3:
        low = x.amin((1, 2, 3), keepdim=True).expand_as(x)
        high = x.amax((1, 2, 3), keepdim=True).expand_as(x)
        s = r / (forward(x, weight) - forward(low, positive) - forward(high, negative) + GUARD)
        return x * backward(s, weight) - low * backward(s, positive) - high * backward(s, negative)
    out = torch.zeros_like(x)
    for t, w in ((x.clamp(min=0), positive), (x.clamp(max=0), negative)):
        out += t * backward(safe_divide(r, forward(t, w)), w)
    return out

"""Relevance of pixels: through the position embeddings' sum and the patch convolution (the published code's z-box rule)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.backends.shared.safe_division import GUARD, safe_divide
from pyglobenc.hf.architectures.vit import patch_projection, position_embeddings, prefix_tokens
from pyglobenc.methods.relevance.rules import Rules
from pyglobenc.methods.relevance.states import States


def pixel_relevance(model: PreTrainedModel, states: States, r: Tensor, rules: Rules) -> Tensor:
    """Relevance of every pixel, summed over channels, (B, height, width), from that of the first layer's input, (B, n, d)."""
    base = model.base_model
    convolution = patch_projection(base)
    pixels, patches = states.take(convolution)
    prefix = [t.detach().to(pixels.dtype).expand(len(pixels), -1, -1) for t in prefix_tokens(base)]
    tokens = torch.cat([*prefix, patches.flatten(2).transpose(1, 2)], dim=1)
    positions = position_embeddings(base).detach().to(pixels.dtype)
    if positions.shape[1] != tokens.shape[1]:
        raise ValueError("TransformerAttribution: relevance of pixels needs the image size that the model was trained for")
    r, _ = rules.add(r, tokens, positions.expand_as(tokens))
    r = r[:, len(prefix) :].transpose(1, 2).reshape_as(patches)
    return _convolution(r, pixels, convolution).sum(1)


def _convolution(r: Tensor, x: Tensor, module: torch.nn.Conv2d) -> Tensor:
    """Relevance of images x (B, C, height, width): between the image's extremes for 3 channels, else the rule of a Linear layer."""
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

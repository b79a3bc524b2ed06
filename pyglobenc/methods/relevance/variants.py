"""The variants of transformer attribution, and the baselines that only read attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.backends.shared.packing import per_token, sequence_sums
from pyglobenc.backends.shared.relevance_tiles import probability_tiles
from pyglobenc.backends.shared.rows import take_queries
from pyglobenc.hf import LayerTrace
from pyglobenc.methods.relevance.layers import pixel_relevance
from pyglobenc.methods.relevance.propagation import RelevancePropagation


def attention_row(layer: LayerTrace, row: Tensor) -> Tensor:
    """Compute the head-averaged attention of the tokens that the head reads.

    Args:
        layer: the captured layer.
        row: the tokens' shares in what the head reads, (B, 1, n).

    Returns:
        The shares times the attention matrix, (B, n).

    Source: generate_attn_last_layer of the code of Chefer et al., 2021.
    """
    row = row.to(layer.q.device)
    return sum(row[:, :, rows] @ alpha.mean(1) for rows, _, _, alpha in _tiles(layer))[:, 0]


def roll_out_attention(layers: Sequence[LayerTrace], row: Tensor) -> Tensor:
    """Roll out the head-averaged attention A, with each row of I + A divided by its sum.

    Args:
        layers: the captured layers that take part, lowest first.
        row: the row from which the rollout starts, (B, 1, n): the tokens' shares in what the head reads.

    Returns:
        The row of the rollout, (B, n).

    Source: Abnar and Zuidema, 2020, as in the code of Chefer et al., 2021.
    """
    for layer in reversed(layers):
        row = row.to(layer.q.device)
        out = torch.zeros_like(row)
        for rows, _, _, alpha in _tiles(layer):
            attention = alpha.mean(1)
            weights = row[:, :, rows] / (1 + attention.sum(-1))[:, None]
            out += weights @ attention
            out[:, :, rows] += weights
        row = out
    return row[:, 0]


def grad_cam(layer: LayerTrace, grad_o: Tensor, row: Tensor) -> Tensor:
    """Compute Grad-CAM on attention as published for BERT.

    Each head's attention is weighted by its mean gradient, <sum_i grad_o[i], sum_j v[j]> / n^2. The mean over
    the heads is scaled to [0, 1] over all entries of the map. Padding takes part in neither the mean nor the
    scaling, so that a padded example gets the values that it has alone.

    Args:
        layer: the captured layer.
        grad_o: gradient of the logit with respect to the layer's attention output, (B, H, n, dh).
        row: the tokens' shares in what the head reads, (B, 1, n).

    Returns:
        The shares times the map, (B, n).

    Source: generate_attn_gradcam of the code of Chefer et al., 2021, for BERT.
    """
    mask, row = layer.key_mask, row.to(layer.q.device)
    v = layer.v if mask is None else layer.v * mask[:, None, :, None]
    count = layer.q.shape[2] if mask is None else mask.sum(1).to(v.dtype)[:, None]
    weights = (grad_o.sum(2) * v.sum(2)).sum(-1) / count**2
    low = high = read = None
    for rows, _, _, alpha in _tiles(layer):
        cam = (alpha * weights[:, :, None, None]).mean(1).clamp_(min=0)
        hidden = (
            torch.zeros_like(cam, dtype=torch.bool)
            if mask is None
            else ~(mask[:, rows, None] & mask[:, None])
        )
        least = cam.masked_fill(hidden, float("inf")).amin((1, 2))
        most = cam.masked_fill(hidden, 0).amax((1, 2))
        low = least if low is None else torch.minimum(low, least)
        high = most if high is None else torch.maximum(high, most)
        part = (row[:, :, rows] @ cam)[:, 0]
        read = part if read is None else read + part
    return _scale(read, low[:, None], high[:, None], mask)


def grad_cam_patches(layer: LayerTrace, grad_o: Tensor, prefix: int) -> Tensor:
    """Compute Grad-CAM on attention as published for ViT: the [CLS] row over the patches.

    The mean gradient of a head runs over these entries only.

    Args:
        layer: the captured layer.
        grad_o: gradient of the logit with respect to the layer's attention output, (B, H, n, dh).
        prefix: number of tokens before the patches.

    Returns:
        Scores of the patches, (B, patches), scaled to [0, 1].

    Source: generate_cam_attn of the code of Chefer et al., 2021.
    """
    position = torch.zeros(layer.q.shape[0], dtype=torch.long, device=layer.q.device)
    weights = (grad_o[:, :, 0] * layer.v[:, :, prefix:].mean(2)).sum(-1)
    q, lse = take_queries(layer.q, position[:, None]), take_queries(layer.lse, position[:, None])
    alpha = next(probability_tiles(q, layer.k, lse, None, layer.scaling, layer.window, position[:, None]))[3]
    cam = (alpha[:, :, 0, prefix:] * weights[..., None]).mean(1).clamp_(min=0)
    return _scale(cam, cam.amin(1, keepdim=True), cam.amax(1, keepdim=True), None)


def _tiles(layer: LayerTrace):
    return probability_tiles(layer.q, layer.k, layer.lse, layer.key_mask, layer.scaling, layer.window)


def _scale(t: Tensor, low: Tensor, high: Tensor, mask: Tensor | None) -> Tensor:
    """Return (t - low) / (high - low), and 0 for padding and where low and high are equal."""
    scaled = torch.where(high > low, (t - low) / (high - low), torch.zeros_like(t))
    return scaled if mask is None else scaled.masked_fill(~mask, 0)


@dataclass(frozen=True)
class Variant:
    """One variant of the method.

    Attributes:
        kind: what the scores are: a "rollout" of relevance maps, the map of one "layer", or relevance of the
            "input". The kinds "attention", "attention_rollout" and "grad_cam" only read attention.
        gradient: multiply the maps by the gradient of the logit.
        layer: number of the layer whose map is read, or from which a rollout starts; negative numbers count
            from the last one. None for a rollout from the start_layer of the call.
        lrp: use the rules of the LRP baseline.
    """

    kind: str
    gradient: bool = False
    layer: int | None = None
    lrp: bool = False

    def lowest_gradient(self, start_layer: int, depth: int) -> int:
        """Return the lowest layer whose attention gradient is read, or depth for none."""
        if not self.gradient:
            return depth
        if self.kind == "rollout":
            return self.start(start_layer, depth)
        return depth - 1 if self.layer is None else self.layer % depth

    def start(self, start_layer: int, depth: int) -> int:
        """Return the lowest layer of a rollout, of `depth` layers; start_layer is that of the call."""
        return start_layer if self.layer is None else self.layer % depth


# "transformer_attribution_last" is the method on the last layer alone, the default of the published BERT code
# for models of 12 layers. "rollout" rolls out relevance without gradients. "last_layer" and "second_layer"
# are the pooled token's row of that layer's map, and "_ablation" multiplies it by the gradient. "full" is the
# relevance of the input tokens or pixels, and "lrp" the same by the LRP baseline's rules. The last three only
# read attention.
VARIANTS = {
    "transformer_attribution": Variant("rollout", gradient=True),
    "transformer_attribution_last": Variant("rollout", gradient=True, layer=-1),
    "rollout": Variant("rollout"),
    "last_layer": Variant("layer", layer=-1),
    "last_layer_ablation": Variant("layer", gradient=True, layer=-1),
    "second_layer": Variant("layer", layer=1),
    "second_layer_ablation": Variant("layer", gradient=True, layer=1),
    "full": Variant("input"),
    "lrp": Variant("input", lrp=True),
    "lrp_last_layer": Variant("layer", layer=-1, lrp=True),
    "last_layer_attn": Variant("attention"),
    "attention_rollout": Variant("attention_rollout"),
    "attn_gradcam": Variant("grad_cam", gradient=True),
}

# Kinds that propagate relevance down the layers; the others only read attention.
FOLLOWED = ("rollout", "layer", "input")

# Function names of the published BERT code, and the variants that they compute.
PUBLISHED = {
    "generate_LRP": "transformer_attribution",
    "generate_LRP_last_layer": "last_layer",
    "generate_LRP_second_layer": "second_layer",
    "generate_full_lrp": "full",
    "generate_attn_last_layer": "last_layer_attn",
    "generate_rollout": "attention_rollout",
    "generate_attn_gradcam": "attn_gradcam",
}


def variant_scores(
    model: PreTrainedModel,
    chosen: Variant,
    propagation: RelevancePropagation,
    start_layer: int,
    prefix: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute the scores of a variant.

    Args:
        model: the stock model.
        chosen: the variant.
        propagation: a new pass of relevance; its rules are used.
        start_layer: the lowest layer of a rollout.
        prefix: number of tokens before the patches of an image; None for text.

    Returns:
        Scores (B, n) of the tokens, or for images (B, patches) or (B, height, width). Also (B,) bool, or (S,)
        for packed sequences, which is True where no relevance reaches any token. The scores are 0 there.

    Raises:
        ValueError: Grad-CAM for images whose head does not read [CLS], or pixels of another image size.
    """
    scores, states = _scores(model, chosen, propagation, start_layer, prefix), propagation.states
    brought = scores != 0
    if chosen.kind == "rollout":
        # A token has received something if its entry differs from the row that the rollout starts from.
        brought = scores != propagation.start_row()[:, 0, prefix:].to(scores.device)
        if prefix is None and propagation.normalize:
            # With normalize, the row of a lone token is 1 even if it receives relevance.
            lone, given = (
                t.to(scores.device)
                for t in (states.lone_tokens(), propagation.token_sums[len(states.layers)])
            )
            brought |= lone & (given != 0)
    cu_seqlens = states.layers[0].cu_seqlens
    if cu_seqlens is None:
        nothing = ~brought.flatten(1).any(1)
        return scores.masked_fill(nothing.view(-1, *[1] * (scores.dim() - 1)), 0), nothing
    nothing = sequence_sums(brought.to(scores.dtype), cu_seqlens) == 0
    return scores.masked_fill(per_token(nothing[:, None], cu_seqlens)[:, 0], 0), nothing


def _scores(
    model: PreTrainedModel,
    chosen: Variant,
    propagation: RelevancePropagation,
    start_layer: int,
    prefix: int | None,
) -> Tensor:
    states = propagation.states
    depth, last, images = len(states.layers), states.layers[-1], prefix is not None
    if chosen.kind == "input":
        _, r = propagation.roll_out(depth, 0)
        return pixel_relevance(model, states, r, propagation.rules) if images else r.sum(-1)
    if chosen.kind == "grad_cam" and images:
        if states.head.position is None or bool((states.head.position != 0).any()):
            raise ValueError(
                "TransformerAttribution: Grad-CAM of images is published for heads that read [CLS]"
            )
        return grad_cam_patches(last, states.grads[-1], prefix)
    if chosen.kind == "rollout":
        start = chosen.start(start_layer, depth)
        row, _ = propagation.roll_out(start, start + 1)
    elif chosen.kind == "layer":
        row = propagation.layer_row(chosen.layer % depth)
    elif chosen.kind == "attention":
        row = attention_row(last, propagation.start_row())
    elif chosen.kind == "attention_rollout":
        row = roll_out_attention(states.layers[start_layer:], propagation.start_row())
    else:
        row = grad_cam(last, states.grads[-1], propagation.start_row())
    return row[:, prefix:]

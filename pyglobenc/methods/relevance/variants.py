"""The variants of transformer attribution, and the baselines that read attention alone."""

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
    """Attention of tokens, averaged over heads, times their shares `row` (B, 1, n): (B, n)."""
    row = row.to(layer.q.device)
    return sum(row[:, :, rows] @ alpha.mean(1) for rows, _, alpha in _tiles(layer))[:, 0]


def roll_out_attention(layers: Sequence[LayerTrace], row: Tensor) -> Tensor:
    """Rollout of head-averaged attention, rows of I + A divided by their sum: row (B, 1, n) of a unit vector
    -> (B, n).
    """
    for layer in reversed(layers):
        row = row.to(layer.q.device)
        out = torch.zeros_like(row)
        for rows, _, alpha in _tiles(layer):
            attention = alpha.mean(1)
            weights = row[:, :, rows] / (1 + attention.sum(-1))[:, None]
            out += weights @ attention
            out[:, :, rows] += weights
        row = out
    return row[:, 0]


def grad_cam(layer: LayerTrace, grad_o: Tensor, row: Tensor) -> Tensor:
    """Grad-CAM on attention as published for BERT: tokens' shares `row` (B, 1, n) times the map scaled to [0,
    1] over all its entries, (B, n).

    The mean gradient of a head has a closed form, <sum_i grad_o[i], sum_j v[j]> / n^2. Padding is left out of
    the mean and of the extremes, so that a padded example gets the values it has alone.
    """
    mask, row = layer.key_mask, row.to(layer.q.device)
    v = layer.v if mask is None else layer.v * mask[:, None, :, None]
    count = layer.q.shape[2] if mask is None else mask.sum(1).to(v.dtype)[:, None]
    weights = (grad_o.sum(2) * v.sum(2)).sum(-1) / count**2
    low = high = read = None
    for rows, _, alpha in _tiles(layer):
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
    """Grad-CAM on attention as published for ViT: the [CLS] row over the patches, its mean gradient theirs,
    (B, patches).
    """
    position = torch.zeros(layer.q.shape[0], dtype=torch.long, device=layer.q.device)
    weights = (grad_o[:, :, 0] * layer.v[:, :, prefix:].mean(2)).sum(-1)
    q, lse = take_queries(layer.q, position[:, None]), take_queries(layer.lse, position[:, None])
    alpha = next(probability_tiles(q, layer.k, lse, None, layer.scaling, layer.window, position[:, None]))[2]
    cam = (alpha[:, :, 0, prefix:] * weights[..., None]).mean(1).clamp_(min=0)
    return _scale(cam, cam.amin(1, keepdim=True), cam.amax(1, keepdim=True), None)


def _tiles(layer: LayerTrace):
    return probability_tiles(layer.q, layer.k, layer.lse, layer.key_mask, layer.scaling, layer.window)


def _scale(t: Tensor, low: Tensor, high: Tensor, mask: Tensor | None) -> Tensor:
    """(t - low) / (high - low), 0 where they are equal and for padding."""
    scaled = torch.where(high > low, (t - low) / (high - low), torch.zeros_like(t))
    return scaled if mask is None else scaled.masked_fill(~mask, 0)


@dataclass(frozen=True)
class Variant:
    """What a variant reads: "rollout" of relevance maps, one "layer" of them, the "input", or attention
    alone.
    """

    kind: str
    gradient: bool = False
    layer: int | None = None
    lrp: bool = False

    def lowest_gradient(self, start_layer: int, depth: int) -> int:
        """First layer whose attention gradient is read, depth for none."""
        if not self.gradient:
            return depth
        if self.kind == "rollout":
            return start_layer
        return depth - 1 if self.layer is None else self.layer % depth


# rollout: of the relevance alone; last_layer, second_layer: the pooled token's row of that layer's map,
# _ablation: with the gradient; full: relevance of the input tokens, or pixels; lrp: the same by the LRP
# baseline's rules; the last three read attention alone
VARIANTS = {
    "transformer_attribution": Variant("rollout", gradient=True),
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

# kinds that follow relevance down the layers; the others only read attention
FOLLOWED = ("rollout", "layer", "input")

# names of the published BERT code's functions
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
    """Scores of a variant: (B, n) tokens; for images, whose first `prefix` tokens aren't patches, (B,
    patches) or (B, height, width).

    And (B,) bool, of packed sequences (S,), where there is nothing in them: no relevance reaches any token,
    and the scores are made 0.
    """
    scores, states = _scores(model, chosen, propagation, start_layer, prefix), propagation.states
    brought = scores != 0
    if chosen.kind == "rollout":
        # the row that a rollout starts from is left as it was
        brought = scores != propagation.start_row()[:, 0, prefix:].to(scores.device)
        if prefix is None and propagation.normalize:
            # but a row of one token is its own whatever it gets
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
        row, _ = propagation.roll_out(start_layer, start_layer + 1)
    elif chosen.kind == "layer":
        row = propagation.layer_row(chosen.layer % depth)
    elif chosen.kind == "attention":
        row = attention_row(last, propagation.start_row())
    elif chosen.kind == "attention_rollout":
        row = roll_out_attention(states.layers[start_layer:], propagation.start_row())
    else:
        row = grad_cam(last, states.grads[-1], propagation.start_row())
    return row[:, prefix:]

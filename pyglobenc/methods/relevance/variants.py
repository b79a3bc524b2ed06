"""The variants of transformer attribution and what each reads of one descent of relevance."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.backends.shared.packing import per_token, sequence_sums
from pyglobenc.methods.relevance.attention_baselines import attention_row, grad_cam, grad_cam_patches, roll_out_attention
from pyglobenc.methods.relevance.pixels import pixel_relevance
from pyglobenc.methods.relevance.propagation import Descent


@dataclass(frozen=True)
class Variant:
    """What a variant reads: "rollout" of relevance maps, one "layer" of them, the "input", or attention alone."""

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


# rollout: of the relevance alone; last_layer, second_layer: the pooled token's row of that layer's map, _ablation: with the gradient;
# full: relevance of the input tokens, or pixels; lrp: the same by the LRP baseline's rules; the last three read attention alone
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
    model: PreTrainedModel, chosen: Variant, descent: Descent, start_layer: int, prefix: int | None
) -> tuple[Tensor, Tensor]:
    """Scores of a variant: (B, n) tokens; for images, whose first `prefix` tokens aren't patches, (B, patches) or (B, height, width).

    And (B,) bool, of packed sequences (S,), where there is nothing in them: no relevance reaches any token, and the scores are made 0.
    """
    scores, states = _scores(model, chosen, descent, start_layer, prefix), descent.states
    brought = scores != 0
    if chosen.kind == "rollout":
        # the row that a rollout starts from is left as it was
        brought = scores != descent.start_row()[:, 0, prefix:].to(scores.device)
        if prefix is None and descent.normalize:
            # but a row of one token is its own whatever it gets
            lone, given = (t.to(scores.device) for t in (states.lone_tokens(), descent.token_sums[len(states.layers)]))
            brought |= lone & (given != 0)
    offsets = states.layers[0].offsets
    if offsets is None:
        nothing = ~brought.flatten(1).any(1)
        return scores.masked_fill(nothing.view(-1, *[1] * (scores.dim() - 1)), 0), nothing
    nothing = sequence_sums(brought.to(scores.dtype), offsets) == 0
    return scores.masked_fill(per_token(nothing[:, None], offsets)[:, 0], 0), nothing


def _scores(model: PreTrainedModel, chosen: Variant, descent: Descent, start_layer: int, prefix: int | None) -> Tensor:
    states = descent.states
    depth, last, images = len(states.layers), states.layers[-1], prefix is not None
    if chosen.kind == "input":
        _, r = descent.roll_out(depth, 0)
        return pixel_relevance(model, states, r, descent.rules) if images else r.sum(-1)
    if chosen.kind == "grad_cam" and images:
        if states.head.position is None or bool((states.head.position != 0).any()):
            raise ValueError("TransformerAttribution: Grad-CAM of images is published for heads that read [CLS]")
        return grad_cam_patches(last, states.grads[-1], prefix)
    if chosen.kind == "rollout":
        row, _ = descent.roll_out(start_layer, start_layer + 1)
    elif chosen.kind == "layer":
        row = descent.layer_row(chosen.layer % depth)
    elif chosen.kind == "attention":
        row = attention_row(last, descent.start_row())
    elif chosen.kind == "attention_rollout":
        row = roll_out_attention(states.layers[start_layer:], descent.start_row())
    else:
        row = grad_cam(last, states.grads[-1], descent.start_row())
    return row[:, prefix:]

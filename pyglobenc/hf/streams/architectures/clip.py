"""CLIP (pre-norm): a text encoder and an image encoder, whose outputs are compared."""

from torch import nn

from pyglobenc.hf.streams.modules import Streams, one_sum

MODEL_TYPES = ("clip",)


def streams(model: nn.Module) -> Streams:
    """Return the layers of the text encoder and of the image encoder, on hidden states (B, n, d)."""
    text, image = (
        [
            one_sum(layer, layer.self_attn, layer.self_attn.out_proj, layer.layer_norm2)
            for layer in encoder.encoder.layers
        ]
        for encoder in (model.text_model, model.vision_model)
    )
    return Streams(text, image, "similarity")

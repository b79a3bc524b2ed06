"""BART (post-norm) and encoder-decoders with the same module names, some of which are pre-norm."""

from torch import nn

from pyglobenc.hf.streams.modules import Streams, one_sum, two_sums

PRE_NORM = ("mbart", "pegasus", "blenderbot", "m2m_100")
MODEL_TYPES = ("bart", "marian", "blenderbot-small", "plbart", *PRE_NORM)


def streams(model: nn.Module) -> Streams:
    """Return the layers of the decoder and of the encoder, which map hidden states (B, n, d) to (B, n, d)."""
    base, pre_norm = model.base_model, model.config.model_type in PRE_NORM
    return Streams(
        [decoder_layer(layer, pre_norm) for layer in base.decoder.layers],
        [
            one_sum(
                layer,
                layer.self_attn,
                layer.self_attn.out_proj,
                layer.final_layer_norm if pre_norm else layer.self_attn_layer_norm,
            )
            for layer in base.encoder.layers
        ],
        "cross",
    )


def decoder_layer(layer: nn.Module, pre_norm: bool):
    """Return a layer of a decoder with these module names."""
    own, cross = layer.self_attn, layer.encoder_attn
    norms = (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm)
    if pre_norm:
        norms = (layer.encoder_attn_layer_norm, layer.final_layer_norm)
    return two_sums(layer, (own, own.out_proj), (cross, cross.out_proj), norms, pre_norm)

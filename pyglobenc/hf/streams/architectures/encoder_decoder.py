"""Any known encoder with a decoder that attends to it: images to captions, and texts to texts."""

from torch import nn

from pyglobenc.hf.streams.architectures import bart
from pyglobenc.hf.streams.modules import StreamLayer, Streams, encoder_layers, two_sums

MODEL_TYPES = ("vision-encoder-decoder", "encoder-decoder")


def streams(model: nn.Module) -> Streams:
    """Return the layers of the decoder and of the encoder, which map hidden states (B, n, d) to (B, n, d).

    Raises:
        ValueError: the encoder or the decoder has an architecture that isn't known here.
    """
    decoder = model.decoder
    kind = decoder.config.model_type
    if kind not in DECODERS:
        raise ValueError(
            f"capture: cross attention of {type(decoder).__name__} ({kind}) is not supported; known "
            f"decoders: {', '.join(DECODERS)}"
        )
    return Streams(DECODERS[kind](decoder.base_model), encoder_layers(model.encoder), "cross")


def _bert(base: nn.Module) -> list[StreamLayer]:
    return [
        two_sums(
            layer,
            (layer.attention.self, layer.attention.output.dense),
            (layer.crossattention.self, layer.crossattention.output.dense),
            (layer.attention.output.LayerNorm, layer.crossattention.output.LayerNorm),
            pre_norm=False,
        )
        for layer in base.encoder.layer
    ]


def _gpt2(base: nn.Module) -> list[StreamLayer]:
    return [
        two_sums(
            layer,
            (layer.attn, layer.attn.c_proj),
            (layer.crossattention, layer.crossattention.c_proj),
            (layer.ln_cross_attn, layer.ln_2),
            pre_norm=True,
        )
        for layer in base.h
    ]


def _bart(base: nn.Module) -> list[StreamLayer]:
    decoder, pre_norm = base.decoder, base.config.model_type in bart.PRE_NORM
    return [bart.decoder_layer(layer, pre_norm) for layer in decoder.layers]


DECODERS = dict.fromkeys(("bert", "roberta", "xlm-roberta"), _bert)
DECODERS |= {"gpt2": _gpt2} | dict.fromkeys(("bart", "mbart"), _bart)

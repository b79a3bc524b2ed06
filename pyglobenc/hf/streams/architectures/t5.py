"""T5 (pre-norm), with a bias of the scores for each pair of positions, and models with its module names."""

from torch import nn

from pyglobenc.hf.streams.modules import Streams, one_sum, two_sums

MODEL_TYPES = ("t5", "mt5", "umt5")


def streams(model: nn.Module) -> Streams:
    """Return the layers of the decoder and of the encoder, which map hidden states (B, n, d) to (B, n, d)."""
    base = model.base_model
    return Streams(
        [_decoder_layer(block) for block in base.decoder.block],
        [
            one_sum(
                block,
                block.layer[0].SelfAttention,
                block.layer[0].SelfAttention.o,
                block.layer[1].layer_norm,
            )
            for block in base.encoder.block
        ],
        "cross",
    )


def _decoder_layer(block: nn.Module):
    own, cross, mlp = block.layer
    norms = (cross.layer_norm, mlp.layer_norm)
    attentions = ((one, one.o) for one in (own.SelfAttention, cross.EncDecAttention))
    return two_sums(block, *attentions, norms, pre_norm=True)

"""LXMERT (post-norm): a text and the objects of an image, whose last layers attend to each other.

Its attention modules ignore transformers' interface. In a layer of both streams one cross attention is called
twice, first for the text and then for the image.
"""

from typing import Any

from torch import nn

from pyglobenc.common.deferred import may_look
from pyglobenc.hf.streams.modules import Attention, Point, StreamLayer, Streams
from pyglobenc.hf.trace.layers import OwnScores

MODEL_TYPES = ("lxmert",)


def streams(model: nn.Module) -> Streams:
    """Return the layers of the text and of the image, on hidden states (B, n, d)."""
    encoder = model.base_model.encoder
    text, image = (
        [
            _layer(Point(layer, "input"), Point(layer, "output"), layer.attention, layer.attention.self)
            for layer in layers
        ]
        for layers in (encoder.layer, encoder.r_layers)
    )
    for layer in encoder.x_layers:
        sides = (
            (text, layer.lang_self_att, layer.lang_output),
            (image, layer.visn_self_att, layer.visn_output),
        )
        for call, (stream, own, end) in enumerate(sides):
            both = layer.visual_attention
            start, between = Point(both, "input", call), Point(both, "output", call)
            cross = _attention(both.att, both.output, start, call)
            stream.append(
                StreamLayer(start, Point(end, "output"), _attention(own.self, own.output, between, 0), cross)
            )
    return Streams(text, image, "co-attention")


def _layer(start: Point, end: Point, attention: nn.Module, inner: nn.Module) -> StreamLayer:
    return StreamLayer(start, end, _attention(inner, attention.output, start, 0))


def _attention(module: nn.Module, output: nn.Module, residual: Point, call: int) -> Attention:
    return Attention(
        module,
        output.dense,
        residual,
        Point(output.LayerNorm, "input", call),
        call=call,
        projections=(module.query, module.key, module.value),
        own_scores=_own_scores,
    )


def _own_scores(module: nn.Module, arguments: dict[str, Any]) -> OwnScores:
    mask = arguments["attention_mask"]
    real = None if mask is None or (may_look() and not mask.any()) else mask[:, 0, 0] == 0
    return OwnScores(module.attention_head_size**-0.5, None, real)

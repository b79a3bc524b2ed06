"""The attention modules of a model's two streams of tokens, and the residual sums that they add to."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from pyglobenc.hf.registry import find_layers
from pyglobenc.hf.trace.layers import OwnScores


class Point(NamedTuple):
    """A tensor (B, n, d) of the forward pass: the first input or the output of a module."""

    module: nn.Module
    side: str  # "input" or "output"
    call: int = 0  # which of the module's calls in one forward pass


class Attention(NamedTuple):
    """One attention of a layer. Its output o W_O + b is added to a residual x."""

    module: nn.Module  # the module that transformers hands to the attention function
    output: nn.Module  # W_O
    residual: Point  # x
    total: Point  # x + o W_O + b
    # module and name of a parameter (d,) that multiplies o W_O + b
    scale: tuple[nn.Module, str] | None = None
    call: int = 0  # which of the module's calls in one forward pass
    # For a module that ignores transformers' interface: its projections, and a function that returns how it
    # changes the products q . k, given the module and its arguments by name.
    projections: tuple[nn.Module, nn.Module, nn.Module] | None = None
    own_scores: Callable[[nn.Module, dict[str, Any]], OwnScores] | None = None


class StreamLayer(NamedTuple):
    """One layer of a stream: attention to its own tokens, and to the other stream's if there is such one."""

    start: Point  # the layer's input
    end: Point  # its output
    own: Attention
    cross: Attention | None = None

    @property
    def attentions(self) -> list[Attention]:
        """The layer's attentions."""
        return [self.own] if self.cross is None else [self.own, self.cross]


class Streams(NamedTuple):
    """The layers of a model's two streams, first to last.

    Attributes:
        target: the decoder of an encoder-decoder; the text encoder of a model of texts and images.
        source: the encoder; the image encoder.
        kind: "cross" if the target attends to the source's last output; "similarity" if both end in a
            vector and the model compares the vectors; "co-attention" if the layers of both streams with cross
            attention attend to each other, before each attends to its own tokens.
    """

    target: list[StreamLayer]
    source: list[StreamLayer]
    kind: str

    @property
    def layers(self) -> list[StreamLayer]:
        """The layers of both streams."""
        return [*self.target, *self.source]


def encoder_layers(model: nn.Module) -> list[StreamLayer]:
    """Return the layers of an encoder of an architecture that `capture` knows.

    Raises:
        TypeError, ValueError: as `find_layers`, or the layers do more to the attention's output than add it.
    """
    out = []
    for layer in find_layers(model):
        if layer.own_scores is not None or layer.added_norm is not None:
            raise ValueError(
                f"capture: {type(model).__name__} as one stream of two is not supported, because its "
                "attention doesn't add o W_O + b to the residual, or computes its scores itself"
            )
        norm = layer.output_norm if layer.pre_norm else layer.attention_norm
        out.append(one_sum(layer.block, layer.attention, layer.output, norm, layer.scale))
    return out


def one_sum(
    block: nn.Module,
    attention: nn.Module,
    output: nn.Module,
    norm: nn.Module,
    scale: tuple[nn.Module, str] | None = None,
) -> StreamLayer:
    """Return a layer without cross attention, whose residual sum goes into a norm."""
    start = Point(block, "input")
    return StreamLayer(
        start, Point(block, "output"), Attention(attention, output, start, Point(norm, "input"), scale)
    )


def two_sums(
    block: nn.Module,
    own: tuple[nn.Module, nn.Module],
    cross: tuple[nn.Module, nn.Module],
    norms: tuple[nn.Module, nn.Module],
    pre_norm: bool,
) -> StreamLayer:
    """Return a layer with cross attention.

    Args:
        block: the layer.
        own, cross: the attention module and its W_O.
        norms: the norms that the two residual sums go into. In a post-norm layer the first norm's output is
            the residual of the second sum, in a pre-norm layer its input.
        pre_norm: whether the norms come before the attention and the MLP.
    """
    (first, second), start = norms, Point(block, "input")
    return StreamLayer(
        start,
        Point(block, "output"),
        Attention(*own, start, Point(first, "input")),
        Attention(*cross, Point(first, "input" if pre_norm else "output"), Point(second, "input")),
    )

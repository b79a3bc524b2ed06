"""What the functions that explain return: scores with what they belong to, how they are saved and shown."""

from pyglobenc.results.attribution import Attribution, Attributions, save, to_json
from pyglobenc.results.generation import GenerationAttribution, load
from pyglobenc.results.images import ImageAttribution, ImageAttributions
from pyglobenc.results.layers import LayerAttribution
from pyglobenc.results.span_sums import SpanSums

__all__ = [
    "Attribution",
    "Attributions",
    "GenerationAttribution",
    "ImageAttribution",
    "ImageAttributions",
    "LayerAttribution",
    "SpanSums",
    "load",
    "save",
    "to_json",
]

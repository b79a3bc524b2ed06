"""Binding to transformers: reads tensors and calls, no arithmetic on attributions."""

from pyglobenc.hf.capture import Trace, capture
from pyglobenc.hf.layers import LayerModules, LayerTrace, NormStats
from pyglobenc.hf.registry import find_layers

__all__ = ["LayerModules", "LayerTrace", "NormStats", "Trace", "capture", "find_layers"]

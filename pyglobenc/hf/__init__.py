"""Binding to transformers: reads tensors and calls, no arithmetic on attributions."""

from pyglobenc.hf.registry import find_layers
from pyglobenc.hf.trace.capture import Trace, capture
from pyglobenc.hf.trace.layers import LayerModules, LayerTrace, NormStats

__all__ = ["LayerModules", "LayerTrace", "NormStats", "Trace", "capture", "find_layers"]

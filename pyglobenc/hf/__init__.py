"""Binds to transformers: captures the tensors of a stock model, and describes its architecture and inputs."""

from pyglobenc.hf.registry import find_layers
from pyglobenc.hf.trace.capture import Trace, capture
from pyglobenc.hf.trace.layers import LayerModules, LayerTrace, NormStats

__all__ = ["LayerModules", "LayerTrace", "NormStats", "Trace", "capture", "find_layers"]

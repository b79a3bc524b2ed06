"""The module's former path: `estimate_memory` lies in `pyglobenc.methods.memory`."""

from pyglobenc.methods.memory import Estimate, estimate_memory

__all__ = ["Estimate", "estimate_memory"]

"""Token attribution for transformers at the price of the forward pass."""

from pyglobenc._version import __version__
from pyglobenc.hf import capture
from pyglobenc.methods.family import Rollout
from pyglobenc.methods.globenc import GlobEnc

__all__ = ["GlobEnc", "Rollout", "__version__", "capture"]

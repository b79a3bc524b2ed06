"""The module's former path: `join` lies in `pyglobenc.inputs.windows`."""

from pyglobenc.inputs.windows import join

__all__ = ["join"]

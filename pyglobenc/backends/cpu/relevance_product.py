"""Rows times the map of attention and its gradient, or times its transpose, for a block of queries at a time.

The kernel is in csrc/cpu/relevance_maps.cpp.
"""

from torch import Tensor

from pyglobenc.backends.cpu._extension import relevance_limits
from pyglobenc.backends.cpu._relevance import query_tiles
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.relevance_tiles import product

__all__ = ["run", "why_not"]


def why_not(inputs: RelevanceInputs, r: Tensor, transposed: bool) -> list[str]:
    """Return why the kernel can't run."""
    return relevance_limits(inputs, r)


def run(inputs: RelevanceInputs, r: Tensor, transposed: bool) -> Tensor:
    """See `pyglobenc.ops.relevance_product`: -> (B, T, m), or with transposed (B, T, n)."""
    return product(query_tiles(inputs), inputs, r, transposed)

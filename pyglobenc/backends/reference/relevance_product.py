"""Rows times the map of attention and its gradient, or times its transpose, a tile of queries at a time."""

from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.reference.relevance_attention import query_tiles
from pyglobenc.backends.shared.relevance_tiles import product


def run(inputs: RelevanceInputs, r: Tensor, transposed: bool) -> Tensor:
    """See `pyglobenc.ops.relevance_product`: -> (B, T, m), or with transposed (B, T, n)."""
    return product(query_tiles(inputs), inputs, r, transposed)

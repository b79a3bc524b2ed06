"""Rows times the map of attention and its gradient, by the pass over columns of `relevance_attention`.

The pass takes 3 n^2 d multiply-adds, n being the larger number of queries and keys.
"""

from torch import Tensor

from pyglobenc.backends.cuda._relevance import relevance_reasons
from pyglobenc.backends.cuda.relevance_attention import CudaPasses
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.relevance_passes import product_reasons, squared

__all__ = ["run", "why_not"]


def why_not(inputs: RelevanceInputs, r: Tensor, transposed: bool) -> list[str]:
    """Return why the kernel can't run; a transposed product needs up to 8 more columns."""
    return product_reasons(relevance_reasons, inputs, r, transposed)


def run(inputs: RelevanceInputs, r: Tensor, transposed: bool) -> Tensor:
    """See `pyglobenc.ops.relevance_product`: -> (B, T, m), or with transposed (B, T, n)."""
    size = (inputs.q if transposed else inputs.k).shape[2]
    inputs, r = squared(inputs, r, transposed)
    return CudaPasses(inputs).product(r)[..., :size]

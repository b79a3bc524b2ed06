"""One layer of the rollout of relevance maps in row mode, r (I + A), by the passes of `relevance_attention`.

With normalize, a pass over rows first computes the row sums of A. The pass over columns computes the product.
Each takes 3 n^2 d multiply-adds.
"""

from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.kernels._relevance import relevance_reasons as why_not
from pyglobenc.kernels.relevance_attention import TritonPasses

__all__ = ["run", "why_not"]


def run(inputs: RelevanceInputs, r: Tensor) -> Tensor:
    """See `pyglobenc.ops.relevance_rollout_step`: -> (B, T, n)."""
    return TritonPasses(inputs).rollout_step(r)

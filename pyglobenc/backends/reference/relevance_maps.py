"""The map of one layer that the rollout multiplies, A[i,j] = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0).

(Chefer et al., 2021, eq. 13 without the identity.) The map takes 3 n^2 d multiply-adds. Besides it, tiles of
n*d floats are stored.
"""

from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.reference.relevance_attention import query_tiles
from pyglobenc.backends.shared.relevance_tiles import collect_maps


def run(inputs: RelevanceInputs, rows: Tensor | None) -> Tensor:
    """See `pyglobenc.ops.relevance_maps`: -> (B, n, n), or (B, T, n) with rows."""
    return collect_maps(query_tiles(inputs, rows), inputs, rows)

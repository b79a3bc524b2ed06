"""The linear map M that a stage of the encoder layer applies to every decomposed vector.

Once the LayerNorm statistics of a row are fixed, the layer is linear in the decomposed vectors (Modarressi et
al., 2022, eq. 6 to 10): M = (C diag(gamma_1)) (C diag(gamma_2)) ..., with C the centering matrix. The inverse
standard deviations scale the rows and are kept apart.
"""

from collections.abc import Sequence

from torch import Tensor


def stage_map(t: Tensor, gammas: Sequence[Tensor]) -> Tensor:
    """Apply M to the last axis, `t @ M`.

    Args:
        t: (*, d).
        gammas: weights (d,) of the stage's LayerNorms, in order; empty for a stage without LayerNorm.

    Returns:
        (*, d).
    """
    for gamma in gammas:
        t = (t - t.mean(-1, keepdim=True)) * gamma
    return t


def stage_map_transposed(t: Tensor, gammas: Sequence[Tensor]) -> Tensor:
    """Apply the transpose of M to the last axis: `t @ M.T`, arguments and result (*, d) as `stage_map`."""
    for gamma in reversed(gammas):
        t = t * gamma
        t = t - t.mean(-1, keepdim=True)
    return t

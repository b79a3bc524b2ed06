"""The papers' definitions, word for word, with the decomposed vector of every pair, for small cases."""

import torch
from torch import Tensor


def attention_probabilities(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scaling: float, window: tuple[int, int]
) -> Tensor:
    """Return the softmax (B, H, n, n) over the keys that each query sees; q (B, H, n, dh), k (B, Hkv, n, dh).

    Rows of padding are computed too.
    """
    n = q.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(2, 3) * scaling
    for i in range(n):
        for j in range(n):
            left, right = window
            if (left >= 0 and j < i - left) or (right >= 0 and j > i + right):
                scores[:, :, i, j] = -torch.inf
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


def stage_matrix(d: int, gammas: list[Tensor]) -> Tensor:
    """Return the matrix (d, d) of a stage: centering and scaling by each gamma (d,), in order."""
    centering = torch.eye(d, dtype=torch.float64) - 1 / d
    out = torch.eye(d, dtype=torch.float64)
    for gamma in gammas:
        out = out @ centering @ torch.diag(gamma)
    return out


def decomposed_vectors(
    alpha: Tensor, v: Tensor, weight: Tensor, x: Tensor | None, gammas: list[Tensor], rstd: Tensor | None
) -> Tensor:
    """Return the decomposed vectors of one stage, (B, n, n, d).

    Args:
        alpha: (B, H, n, n) attention probabilities.
        v: (B, Hkv, n, dh) values.
        weight: (H, dh, d) output projection.
        x: (B, n, d) input of the layer, or None.
        rstd: (B, n) reciprocal standard deviation of the LayerNorm.
    """
    v = v.repeat_interleave(weight.shape[0] // v.shape[1], dim=1)
    vectors = torch.einsum("bhij,bhjc,hcd->bijd", alpha, v, weight)
    if x is not None:
        i = torch.arange(x.shape[1])
        vectors[:, i, i] += x
    vectors = vectors @ stage_matrix(weight.shape[2], gammas)
    return vectors if rstd is None else vectors * rstd[:, :, None, None]

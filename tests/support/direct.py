"""The papers' definitions, word for word: every decomposed vector of every (query, key) pair is formed. Small
cases only.
"""

import torch
from torch import Tensor


def attention_probabilities(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scaling: float, window: tuple[int, int]
) -> Tensor:
    """Softmax over the keys that each query sees: q (B, H, n, dh), k (B, Hkv, n, dh) -> (B, H, n, n); rows of
    padding too.
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
    """M of a stage, (d, d): centering and scaling by each gamma (d,), in order."""
    centering = torch.eye(d, dtype=torch.float64) - 1 / d
    out = torch.eye(d, dtype=torch.float64)
    for gamma in gammas:
        out = out @ centering @ torch.diag(gamma)
    return out


def decomposed_vectors(
    alpha: Tensor, v: Tensor, weight: Tensor, x: Tensor | None, gammas: list[Tensor], rstd: Tensor | None
) -> Tensor:
    """Vectors of one stage, (B, n, n, d): alpha (B, H, n, n), v (B, Hkv, n, dh), weight (H, dh, d), x (B, n,
    d) or None, rstd (B, n).
    """
    v = v.repeat_interleave(weight.shape[0] // v.shape[1], dim=1)
    vectors = torch.einsum("bhij,bhjc,hcd->bijd", alpha, v, weight)
    if x is not None:
        i = torch.arange(x.shape[1])
        vectors[:, i, i] += x
    vectors = vectors @ stage_matrix(weight.shape[2], gammas)
    return vectors if rstd is None else vectors * rstd[:, :, None, None]

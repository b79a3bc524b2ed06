"""Softmax attention and its log-sum-exp, plain: n*n probabilities of one head at a time exist."""

import torch
from torch import Tensor

from pyglobenc.reference.token_norms import hide_window


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scaling: float, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.attention`: -> o (B, H, n, dh), lse (B, H, n)."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // group].transpose(1, 2) * scaling
        scores = scores.transpose(1, 2)[:, None].clone()
        hide_window(scores, None, 0, k.shape[2], window)
        scores = scores[:, 0].transpose(1, 2)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, :], float("-inf"))
        lses.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v[:, h // group])
    return torch.stack(outs, 1), torch.stack(lses, 1)

"""Op `relevance_attention`: relevance through attention; materialised: every head's probabilities, scores and
relevance (B, H, n, n).

    pytest benchmarks/bench_relevance_attention.py --csv relevance_attention
"""

import torch
from op_benchmark import H, suite

from pyglobenc.backends.shared.safe_division import safe_divide


def materialised(q, k, v, lse, grad_o, s):
    scores = q @ k.transpose(2, 3)
    alpha = torch.exp(scores * q.shape[3] ** -0.5 - lse[..., None])
    relevance = alpha * (s @ v.transpose(2, 3)) / 2
    u = safe_divide(relevance, scores)
    maps = (grad_o @ v.transpose(2, 3) * relevance).clamp(min=0).mean(1)
    return (
        q * (u @ k) / 2,
        k * (u.transpose(2, 3) @ q) / 2,
        v * (alpha.transpose(2, 3) @ s) / 2,
        maps.sum(-1),
        None,
    )


bench_relevance_attention = suite(
    "relevance_attention", materialised, lambda batch, n: 6 * batch * H * n * n, sdpa=True
)

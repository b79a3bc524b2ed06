"""Op `relevance_maps`: the map of one layer; materialised: every head's probabilities, relevance and gradient
(B, H, n, n).

    pytest benchmarks/bench_relevance_maps.py --csv relevance_maps
"""

import torch
from op_benchmark import H, suite


def materialised(q, k, v, lse, grad_o, s):
    alpha = torch.exp(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - lse[..., None])
    relevance = alpha * (s @ v.transpose(2, 3)) / 2
    return (grad_o @ v.transpose(2, 3) * relevance).clamp(min=0).mean(1)


bench_relevance_maps = suite(
    "relevance_maps", materialised, lambda batch, n: 4 * batch * H * n * n, sdpa=True
)

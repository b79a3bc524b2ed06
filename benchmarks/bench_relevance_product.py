"""Op `relevance_product`: r A without A; materialised: every head's probabilities and gradient (B, H, n, n).

pytest benchmarks/bench_relevance_product.py --csv relevance_product
"""

import torch
from op_benchmark import H, suite


def materialised(r, q, k, v, lse, grad_o):
    alpha = torch.exp(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - lse[..., None])
    return r @ (grad_o @ v.transpose(2, 3) * alpha).clamp(min=0).mean(1)


bench_relevance_product = suite(
    "relevance_product", materialised, lambda batch, n: 3 * batch * H * n * n, sdpa=True
)

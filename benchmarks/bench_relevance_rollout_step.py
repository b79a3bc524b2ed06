"""Op `relevance_rollout_step`: r (I + A) without A; materialised: every head's probabilities, relevance and
gradient (B, H, n, n).

    pytest benchmarks/bench_relevance_rollout_step.py --csv relevance_rollout_step
"""

import torch
from op_benchmark import H, suite


def materialised(r, q, k, v, lse, grad_o, s):
    alpha = torch.exp(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - lse[..., None])
    relevance = alpha * (s @ v.transpose(2, 3)) / 2
    return r + r @ (grad_o @ v.transpose(2, 3) * relevance).clamp(min=0).mean(1)


bench_relevance_rollout_step = suite(
    "relevance_rollout_step", materialised, lambda batch, n: 4 * batch * H * n * n, sdpa=True
)

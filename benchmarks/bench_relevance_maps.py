"""Op `relevance_maps`: the map of one layer; materialised: every head's probabilities, relevance and gradient (B, H, n, n).

    pytest benchmarks/bench_relevance_maps.py --csv relevance_maps
"""

import torch
from op_benchmark import cases, run


@cases("relevance_maps", materialised_lengths=(128, 512))
def bench_relevance_maps(benchmark, n, backend):
    run(benchmark, "relevance_maps", n, backend, materialised)


def materialised(q, k, v, lse, grad_o, s):
    alpha = torch.exp(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - lse[..., None])
    relevance = alpha * (s @ v.transpose(2, 3)) / 2
    return (grad_o @ v.transpose(2, 3) * relevance).clamp(min=0).mean(1)

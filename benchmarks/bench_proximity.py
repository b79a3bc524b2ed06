"""Op `proximity`: L1 proximity of each key's vectors to 64 rows; materialised: the vectors (B, 64, n, d).

pytest benchmarks/bench_proximity.py --csv proximity
"""

import torch
from op_benchmark import D, suite


def materialised(alpha, v, weight, y):
    vectors = torch.einsum("bhtj,bhjc,hcd->btjd", alpha, v.to(weight.dtype), weight)
    nearer = y.abs().sum(-1)[..., None] - (y[:, :, None] - vectors).abs().sum(-1)
    return nearer.clamp_(min=0)


bench_proximity = suite("proximity", materialised, lambda batch, n: 2 * batch * 64 * n * D)

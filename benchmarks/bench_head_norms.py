"""Op `head_norms`: norms of the transformed vectors; materialised: the vectors (B, n, H, d) themselves.

pytest benchmarks/bench_head_norms.py --csv head_norms
"""

import torch
from op_benchmark import D, H, suite


def materialised(v, weight):
    return torch.einsum("bhnc,hcd->bnhd", v, weight).norm(dim=-1)


bench_head_norms = suite("head_norms", materialised, lambda batch, n: 2 * batch * n * H * D)

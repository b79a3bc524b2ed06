"""Op `head_norms`: norms of the transformed vectors; materialised: the vectors (B, n, H, d) themselves.

    pytest benchmarks/bench_head_norms.py --csv head_norms
"""

import torch
from op_benchmark import cases, run


@cases("head_norms", materialised_lengths=(128, 512))
def bench_head_norms(benchmark, n, backend):
    run(benchmark, "head_norms", n, backend, materialised)


def materialised(v, weight):
    return torch.einsum("bhnc,hcd->bnhd", v, weight).norm(dim=-1)

"""Op `pair_norms`: norms of every pair; materialised: the decomposed vectors (B, n, n, d) that they are of.

pytest benchmarks/bench_pair_norms.py --csv pair_norms
"""

import torch
from op_benchmark import D, suite

from pyglobenc.bench.example_inputs import tensors


def materialised(q, k, lse, gram):
    made = tensors(q.device.type, q.shape[2], q.shape[0], q.dtype)
    alpha = torch.exp(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - lse[..., None]).to(q.dtype)
    return torch.einsum("bhij,bhjd->bijd", alpha, made["v"] @ made["weight"]).norm(dim=-1)


bench_pair_norms = suite("pair_norms", materialised, lambda batch, n: batch * n * n * D, sdpa=True)

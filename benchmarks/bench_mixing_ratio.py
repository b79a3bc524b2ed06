"""Op `mixing_ratio`: n d^2 multiply-adds, no pair is visited; materialised: the published code's decomposed
vectors (B, n, n, d).

    pytest benchmarks/bench_mixing_ratio.py --csv mixing_ratio
"""

import torch
from op_benchmark import D, suite


def materialised(q, k, v, o, lse, weight):
    alpha = torch.exp(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - lse[..., None]).to(v.dtype)
    vectors = torch.einsum("bhij,bhjd->bijd", alpha, v @ weight)
    own = torch.diagonal(vectors, dim1=1, dim2=2).transpose(1, 2)
    mixed, own = (vectors.sum(2) - own).norm(dim=-1), own.norm(dim=-1)
    return mixed / (mixed + own)


bench_mixing_ratio = suite("mixing_ratio", materialised, lambda batch, n: batch * n * n * D)

"""Op `norm_terms`: what squared norms are made of, from the weights; materialised: the transformed vectors
(B, n, H, d).

    pytest benchmarks/bench_norm_terms.py --csv norm_terms
"""

import torch
from op_benchmark import D, H, suite


def materialised(v, weight, x, gammas):
    vectors = torch.einsum("bhnc,hcd->bnhd", v.to(weight.dtype), weight)
    x = x.to(weight.dtype)
    for gamma in gammas:
        vectors = (vectors - vectors.mean(-1, keepdim=True)) * gamma
        x = (x - x.mean(-1, keepdim=True)) * gamma
    return vectors @ vectors.transpose(2, 3), torch.einsum("bnhd,bnd->bnh", vectors, x), x.square().sum(-1)


bench_norm_terms = suite("norm_terms", materialised, lambda batch, n: 2 * batch * n * H * D)

"""Op `head_gram`: Gram matrices of the heads; materialised: the transformed vectors (B, n, H, d) that they
are of.

    pytest benchmarks/bench_head_gram.py --csv head_gram
"""

import torch
from op_benchmark import D, H, suite

from pyglobenc.bench.example_inputs import tensors


def materialised(v, kernel, x, cross_kernel):
    weight = tensors(v.device.type, v.shape[2], v.shape[0], v.dtype)["weight"]
    vectors = torch.einsum("bhnc,hcd->bnhd", v, weight)
    return vectors @ vectors.transpose(2, 3), torch.einsum("bnhd,bnd->bnh", vectors, x)


bench_head_gram = suite("head_gram", materialised, lambda batch, n: 2 * batch * n * H * D)

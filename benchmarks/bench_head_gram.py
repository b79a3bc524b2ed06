"""Op `head_gram`: Gram matrices of the heads; materialised: the transformed vectors (B, n, H, d) that they are of.

    pytest benchmarks/bench_head_gram.py --csv head_gram
"""

import torch
from op_benchmark import cases, run

from pyglobenc.commands.trial import tensors


@cases("head_gram", materialised_lengths=(128, 512))
def bench_head_gram(benchmark, n, backend):
    run(benchmark, "head_gram", n, backend, materialised)


def materialised(v, kernel, x, cross_kernel):
    weight = tensors(v.device.type, v.shape[2])["weight"]
    vectors = torch.einsum("bhnc,hcd->bnhd", v, weight)
    return vectors @ vectors.transpose(2, 3), torch.einsum("bnhd,bnd->bnh", vectors, x)

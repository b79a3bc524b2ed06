"""Op `token_norms`: norms of every pair; materialised: the decomposed vectors (B, n, n, d) that they are of.

    pytest benchmarks/bench_token_norms.py --csv token_norms
"""

import torch
from op_benchmark import cases, run

from pyglobenc.commands.trial import tensors


@cases("token_norms", materialised_lengths=(128,))
def bench_token_norms(benchmark, n, backend):
    run(benchmark, "token_norms", n, backend, materialised)


def materialised(q, k, lse, gram):
    made = tensors(q.device.type, q.shape[2])
    alpha = torch.exp(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - lse[..., None])
    vectors = torch.einsum("bhnc,hcd->bhnd", made["v"], made["weight"])
    return torch.einsum("bhij,bhjd->bijd", alpha, vectors).norm(dim=-1)

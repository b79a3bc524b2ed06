"""Op `rollout_step`: r N without N; materialised: every head's probabilities (B, H, n, n) and the norms (B,
n, n).

    pytest benchmarks/bench_rollout_step.py --csv rollout_step
"""

import torch
from op_benchmark import H, suite


def materialised(r, log_scale, q, k, lse, gram):
    alpha = torch.exp(q @ k.transpose(2, 3) * q.shape[3] ** -0.5 - lse[..., None]).permute(
        0, 3, 1, 2
    )  # (B, j, H, i)
    norms = (gram @ alpha * alpha).sum(2).clamp(min=0).sqrt()
    out = (norms @ r.transpose(1, 2)).transpose(1, 2)
    top = out.amax(-1)
    return out / top[..., None], log_scale + top.log()


bench_rollout_step = suite("rollout_step", materialised, lambda batch, n: 3 * batch * H * n * n, sdpa=True)

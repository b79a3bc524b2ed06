"""Norms of the decomposed vectors of every (query, key) pair, or of chosen queries: csrc/cuda/token_norms.cu."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda._pairs import pair_reasons, run_pairs


def not_supported(q, k, lse, gram, cross, residual_sq, rstd, key_mask, rows, scaling, window) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    return pair_reasons(q, k, gram, lse=lse, cross=cross, residual_sq=residual_sq, rstd=rstd, key_mask=key_mask, rows=rows)


def token_norms(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    residual_sq: Tensor | None,
    rstd: Tensor | None,
    key_mask: Tensor | None,
    rows: Tensor | None,
    scaling: float,
    window: tuple[int, int],
) -> Tensor:
    """See `pyglobenc.ops.token_norms`: -> (B, n, n), or (B, T, n) with rows."""
    n_queries = q.shape[2] if rows is None else rows.shape[1]
    out = torch.empty(q.shape[0], n_queries, q.shape[2], device=q.device)
    if out.numel() == 0:
        return out
    given = (q, k, lse, gram, cross, residual_sq, rstd, key_mask, rows, None, None, None)
    run_pairs("token_norms", given, (out, None), n_queries, scaling, window)
    return out

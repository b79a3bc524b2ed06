"""Norms of the decomposed vectors of every (query, key) pair, tile by tile in C++: csrc/cpu/token_norms.cpp."""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, limits


def not_supported(q, k, lse, gram, cross, residual_sq, rstd, key_mask, rows, scaling, window) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.token_norms` can't run here."""
    return limits(gram, q, k)


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
    out = gram.new_zeros(q.shape[0], q.shape[2] if rows is None else rows.shape[1], q.shape[2])
    if out.numel():
        args = (q, k, lse.float(), gram, cross, residual_sq, rstd, key_mask, rows, None, scaling, window)
        kernels.token_norms(args, out, torch.get_num_threads())
    return out

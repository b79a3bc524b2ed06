"""One layer of the rollout in row mode, tile by tile in C++, nothing (n, n) stored: csrc/cpu/rollout_step.cpp."""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, limits
from pyglobenc.backends.reference.rollout_step import rescale_rows


def not_supported(r, log_scale, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window, offsets=None) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.rollout_step` can't run here."""
    return limits(gram, q, k)


def rollout_step(
    r: Tensor,
    log_scale: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    residual_sq: Tensor | None,
    rstd: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.rollout_step`: -> r @ norms (B, T, n), each row scaled to maximum 1, and log_scale (B, T)."""
    out = r.new_zeros(r.shape)
    if out.numel():
        ends = None if offsets is None else offsets.long()
        args = (q, k, lse.float(), gram, cross, residual_sq, rstd, key_mask, None, ends, scaling, window)
        kernels.rollout_step(args, r, out, torch.get_num_threads())
    return rescale_rows(out, log_scale, offsets)

"""One layer of the rollout in row mode, nothing (n, n) stored, its rows scaled: csrc/cuda/rollout_step.cu."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda._pairs import pair_reasons, run_pairs
from pyglobenc.backends.shared.packing import on_device


def not_supported(r, log_scale, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window, offsets=None) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    others = dict(lse=lse, cross=cross, residual_sq=residual_sq, rstd=rstd, key_mask=key_mask)
    return pair_reasons(q, k, gram, r=r, log_scale=log_scale, **others)


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
    out, out_scale = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (r, log_scale))
    if out.numel() == 0:
        return out, log_scale.clone()
    longest = r.shape[2]
    if offsets is not None:
        offsets, longest = on_device(offsets, r.device)
    given = (q, k, lse, gram, cross, residual_sq, rstd, key_mask, None, r, offsets, log_scale.contiguous())
    run_pairs("rollout_step", given, (out, out_scale), longest, scaling, window)
    return out, out_scale

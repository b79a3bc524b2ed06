"""One layer of the rollout in row mode, nothing (n, n) stored: csrc/cuda/rollout_step.cu."""

import torch
from torch import Tensor

from pyglobenc.cuda._pairs import pair_reasons, run_pairs
from pyglobenc.reference.packing import sequence_of


def not_supported(r, q, k, lse, gram, cross, residual_sq, rstd, key_mask, scaling, window, offsets=None) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    return pair_reasons(q, k, gram, r=r, lse=lse, cross=cross, residual_sq=residual_sq, rstd=rstd, key_mask=key_mask)


def rollout_step(
    r: Tensor,
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
) -> Tensor:
    """See `pyglobenc.ops.rollout_step`: -> r @ norms (B, T, n), not yet rescaled."""
    out = torch.empty(r.shape, device=r.device)
    if out.numel() == 0:
        return out
    longest, spans = r.shape[2], None
    if offsets is not None:
        longest, sequence = int(offsets.diff().max()), sequence_of(offsets, offsets.device)
        spans = torch.stack([offsets[:-1][sequence], offsets[1:][sequence]]).to(r.device, non_blocking=True)
    given = (q, k, lse, gram, cross, residual_sq, rstd, key_mask)
    return run_pairs("rollout_step", given, None, r, spans, out, longest, scaling, window)

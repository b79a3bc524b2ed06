"""One layer of the rollout in row mode, without an (n, n) array: csrc/cuda/rollout_step.cu."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda._pairs import pair_reasons, run_pairs
from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.packing import on_device


def why_not(inputs: PairInputs, r: Tensor, log_scale: Tensor) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.rollout_step` can't run here; empty if they can."""
    return pair_reasons(inputs, r=r, log_scale=log_scale)


def run(inputs: PairInputs, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.rollout_step`.

    Returns r @ norms (B, T, n), with each row scaled to maximum 1, and log_scale (B, T).
    """
    out, out_scale = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (r, log_scale))
    if out.numel() == 0:
        return out, log_scale.clone()
    cu_seqlens, longest = (
        (None, r.shape[2]) if inputs.cu_seqlens is None else on_device(inputs.cu_seqlens, r.device)
    )
    run_pairs(
        "rollout_step", inputs, (None, r, cu_seqlens, log_scale.contiguous()), (out, out_scale), longest
    )
    return out, out_scale

"""One layer of the rollout in row mode, tile by tile, without an (n, n) array: csrc/cpu/rollout_step.cpp."""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, pair_limits
from pyglobenc.backends.inputs import PairInputs


def why_not(inputs: PairInputs, r: Tensor, log_scale: Tensor) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.rollout_step` can't run here; empty if they can."""
    return pair_limits(inputs)


def run(inputs: PairInputs, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.rollout_step`.

    Returns r @ norms (B, T, n), with each row scaled to maximum 1, and log_scale (B, T).
    """
    out, log_scale = r.new_zeros(r.shape), log_scale.clone()
    if out.numel():
        kernels.rollout_step(kernel_arguments(inputs), r, out, log_scale, torch.get_num_threads())
    return out, log_scale


def kernel_arguments(inputs: PairInputs, rows: Tensor | None = None) -> tuple:
    """Return the arguments of the kernels in csrc/cpu; rows (B, T) are the chosen queries, None for all."""
    ends = None if inputs.cu_seqlens is None else inputs.cu_seqlens.long()
    matrix = (
        inputs.q,
        inputs.k,
        inputs.lse.float(),
        inputs.gram,
        inputs.cross,
        inputs.residual_sq,
        inputs.rstd,
    )
    return (*matrix, inputs.key_mask, rows, ends, inputs.scaling, inputs.window)

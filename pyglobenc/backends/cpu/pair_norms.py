"""Norms of the decomposed vectors of all (query, key) pairs, tile by tile: csrc/cpu/pair_norms.cpp."""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, pair_limits
from pyglobenc.backends.cpu.rollout_step import kernel_arguments
from pyglobenc.backends.inputs import PairInputs


def why_not(inputs: PairInputs, rows: Tensor | None) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.pair_norms` can't run here; empty if they can."""
    return pair_limits(inputs)


def run(inputs: PairInputs, rows: Tensor | None) -> Tensor:
    """See `pyglobenc.ops.pair_norms`: -> (B, n, n), or (B, T, n) with rows."""
    batch, _, n, _ = inputs.q.shape
    out = inputs.gram.new_zeros(batch, n if rows is None else rows.shape[1], n)
    if out.numel():
        kernels.pair_norms(kernel_arguments(inputs, rows), out, torch.get_num_threads())
    return out

"""One layer of the rollout in row mode: r_(l-1) = r_l N_l, with N_l rebuilt tile by tile and never stored.

It takes as many operations as `pair_norms`, and O(n*d + T*n) memory.
"""

import torch
from torch import Tensor

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.reference.pair_norms import diagonal_sq, key_tiles, widened
from pyglobenc.backends.shared.packing import each_run
from pyglobenc.backends.shared.rows import positive_part_, rescale_rows


def run(inputs: PairInputs, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.rollout_step`.

    Returns r @ norms (B, T, n), with each row scaled to maximum 1, and log_scale (B, T).
    """
    if inputs.cu_seqlens is None:
        return rescale_rows(_product(inputs, r), log_scale)
    (out,) = each_run(lambda own, rows: (_product(own, rows),), inputs, (r,), (2,), (2,))
    return rescale_rows(out, log_scale, inputs.cu_seqlens)


def _product(inputs: PairInputs, r: Tensor) -> Tensor:
    """Return r @ norms, (B, T, n)."""
    inputs = widened(inputs)
    diagonal = None if inputs.cross is None else diagonal_sq(inputs)
    weights = r if inputs.rstd is None else r * inputs.rstd[:, None]
    if inputs.key_mask is not None:
        weights = weights.masked_fill(~inputs.key_mask[:, None], 0)
    weights = weights.transpose(1, 2)
    out = torch.empty_like(r)
    for start, sq in key_tiles(inputs, diagonal):
        out[:, :, start : start + sq.shape[1]] = (positive_part_(sq).sqrt_() @ weights).transpose(1, 2)
    return out

"""Relevance through softmax attention, a block of queries at a time.

torch computes the GEMMs, and csrc/cpu/relevance_attention.cpp everything else.
"""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import relevance_limits as why_not
from pyglobenc.backends.cpu._relevance import query_tiles
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.packing import each_run
from pyglobenc.backends.shared.relevance_tiles import rescale_scores, roll_rows

__all__ = ["run", "why_not"]


def run(inputs: RelevanceInputs, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`.

    Returns R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), and r_out (B, T, n) or None.
    """
    if inputs.cu_seqlens is not None:
        return tuple(each_run(run, inputs, (r,), (2,), (2, 2, 2, 1, 2)))
    q, k, v, s = inputs.q, inputs.k, inputs.v, inputs.s
    r_q, r_k, r_v = (t.new_zeros(t.shape) for t in (q, k, v))
    row_sums = q.new_empty(q.shape[0], q.shape[2])
    r_out = None if r is None else r.new_zeros(r.shape)
    sums = q.new_zeros(q.shape[0], 2, dtype=torch.float64)
    product = torch.empty_like(r_k)
    for tile in query_tiles(inputs, sums=sums):
        rows, cols = tile.rows, tile.cols
        row_sums[:, rows] = tile.weighted.sum(-1)
        if r is not None:
            roll_rows(r_out, r, tile, row_sums[:, rows], inputs.normalize)
        torch.matmul(tile.u, k[:, :, cols], out=r_q[:, :, rows])
        # baddbmm would add the product term by term, which rounds more than adding it at once.
        of_keys = product[:, :, cols]
        r_k[:, :, cols] += torch.matmul(tile.u.transpose(2, 3), q[:, :, rows], out=of_keys)
        r_v[:, :, cols] += torch.matmul(tile.alpha.transpose(2, 3), s[:, :, rows], out=of_keys)
    for out, operand in ((r_q, q), (r_k, k), (r_v, v)):
        out.mul_(operand).mul_(0.5)
    if inputs.additive_mask:
        rescale_scores(r_q, r_k, *sums.unbind(1))
    return r_q, r_k, r_v, row_sums, r_out

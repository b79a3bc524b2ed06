"""Relevance through softmax attention, a block of queries at a time: torch's GEMMs, everything else in csrc/cpu/relevance_attention.cpp."""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import single
from pyglobenc.backends.cpu._relevance import query_tiles
from pyglobenc.backends.reference.relevance_attention import PACKED_AXES, rescale_scores, roll_rows
from pyglobenc.backends.shared.packing import by_runs


def not_supported(
    q, k, v, lse, grad_o, s, r, key_mask, scaling, window, additive_mask, normalize, stabilizer, offsets=None
) -> list[str]:
    """Reasons that these arguments of `pyglobenc.ops.relevance_attention` can't run here."""
    return single(*(t for t in (q, k, v, lse, grad_o, s, r) if t is not None))


def relevance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    r: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    additive_mask: bool,
    normalize: bool,
    stabilizer: float,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`: -> R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), r_out (B, T, n) or None."""
    if offsets is not None:
        options, tensors = (None, scaling, window, additive_mask, normalize, stabilizer), (q, k, v, lse, grad_o, s, r)
        return tuple(by_runs(lambda *each: relevance_attention(*each, *options), tensors, PACKED_AXES, (2, 2, 2, 1, 2), offsets))
    r_q, r_k, r_v = (t.new_zeros(t.shape) for t in (q, k, v))
    row_sums = q.new_empty(q.shape[0], q.shape[2])
    r_out = None if r is None else r.new_zeros(r.shape)
    sums = q.new_zeros(q.shape[0], 2, dtype=torch.float64)
    product = torch.empty_like(r_k)
    shared = (key_mask, scaling, window, None, additive_mask, stabilizer, sums)
    for tile in query_tiles(q, k, v, lse, grad_o, s, *shared):
        rows = tile.rows
        row_sums[:, rows] = tile.weighted.sum(-1)
        if r is not None:
            roll_rows(r_out, r, tile, row_sums[:, rows], normalize)
        torch.matmul(tile.u, k, out=r_q[:, :, rows])
        # not baddbmm: adding a block's product at once rounds less than adding its terms one by one
        r_k += torch.matmul(tile.u.transpose(2, 3), q[:, :, rows], out=product)
        r_v += torch.matmul(tile.alpha.transpose(2, 3), s[:, :, rows], out=product)
    for out, operand in ((r_q, q), (r_k, k), (r_v, v)):
        out.mul_(operand).mul_(0.5)
    if additive_mask:
        rescale_scores(r_q, r_k, *sums.unbind(1))
    return r_q, r_k, r_v, row_sums, r_out

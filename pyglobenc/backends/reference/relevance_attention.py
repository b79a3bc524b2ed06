"""Relevance through softmax attention, with the map that the rollout uses, a block of queries at a time.

    s            = R_o / safe(o)
    alpha[i,j]   = exp(scaling q[i].k[j] - lse[i])
    R_alpha[i,j] = alpha[i,j] <s[i], v[j]> / 2
    U[i,j]       = R'[i,j] / safe(q[i].k[j])
    A[i,j]       = mean_h max(<grad_o[i], v[j]> R_alpha[i,j], 0)
    R_q          = q (U k) / 2
    R_k          = k (U^T q) / 2
    R_v          = v (alpha^T s) / 2

(Chefer et al., 2021, eq. 7 and 13, and the matmul rules of the published code.) R' is R_alpha. After BERT's
additive mask it is c R_alpha t / safe(t), with t = scaling q.k and c the factor of the add rule for the
example. Since c only multiplies R_q and R_k, it is applied at the end, and one pass over the pairs suffices.
The pass takes 6 n^2 d multiply-adds and tiles of n*d floats, and stores no (n, n) array.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.packing import each_run
from pyglobenc.backends.shared.relevance_tiles import of_queries, probability_tiles, rescale_scores, roll_rows
from pyglobenc.backends.shared.rows import positive_part_
from pyglobenc.backends.shared.safe_division import safe_divide


@dataclass
class QueryTile:
    """The pairs of a block of I queries with the J keys that their window reaches.

    Attributes:
        rows, cols: the ranges of the queries and of the keys.
        dots: unscaled q . k, (B, H, I, J).
        alpha: attention probabilities, (B, H, I, J), 0 for masked keys.
        relevance: R_alpha, (B, H, I, J).
        weighted: A, (B, I, J).
    """

    rows: slice
    cols: slice
    dots: Tensor
    alpha: Tensor
    relevance: Tensor
    weighted: Tensor


def run(inputs: RelevanceInputs, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`.

    Returns R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), and r_out (B, T, n) or None.
    """
    if inputs.cu_seqlens is not None:
        return tuple(each_run(run, inputs, (r,), (2,), (2, 2, 2, 1, 2)))
    q, k, v = inputs.q, inputs.k, inputs.v
    r_q, r_k, r_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    row_sums = q.new_empty(q.shape[0], q.shape[2])
    r_out = None if r is None else torch.zeros_like(r)
    total = kept = q.new_zeros(q.shape[0], dtype=torch.float64)
    for tile in query_tiles(inputs):
        rows, cols = tile.rows, tile.cols
        row_sums[:, rows] = tile.weighted.sum(-1)
        if r is not None:
            roll_rows(r_out, r, tile, row_sums[:, rows], inputs.normalize)
        r_v[:, :, cols] += tile.alpha.transpose(2, 3) @ inputs.s[:, :, rows]
        passed = tile.relevance
        if inputs.additive_mask:
            total = total + passed.sum((1, 2, 3), dtype=torch.float64)
            scores = tile.dots * inputs.scaling
            passed = safe_divide(passed, scores).mul_(scores)
            kept = kept + passed.sum((1, 2, 3), dtype=torch.float64)
        u = safe_divide(passed, tile.dots, inputs.stabilizer)
        r_q[:, :, rows] = u @ k[:, :, cols]
        r_k[:, :, cols] += u.transpose(2, 3) @ q[:, :, rows]
    for out, operand in ((r_q, q), (r_k, k), (r_v, v)):
        out.mul_(operand).mul_(0.5)
    if inputs.additive_mask and inputs.rescale:
        rescale_scores(r_q, r_k, total, kept)
    return r_q, r_k, r_v, row_sums, r_out


def query_tiles(inputs: RelevanceInputs, positions: Tensor | None = None) -> Iterator[QueryTile]:
    """Yield the tiles of the queries at positions (B, m), or of all queries if positions is None."""
    q, lse, s, grad_o = of_queries(inputs, positions)
    values = inputs.v.transpose(2, 3)
    for rows, cols, dots, alpha in probability_tiles(
        q, inputs.k, lse, inputs.key_mask, inputs.scaling, inputs.window, positions, inputs.score_mod
    ):
        relevance = (s[:, :, rows] @ values[..., cols]).mul_(alpha).mul_(0.5)
        weighted = (
            relevance.clone() if grad_o is None else (grad_o[:, :, rows] @ values[..., cols]).mul_(relevance)
        )
        yield QueryTile(rows, cols, dots, alpha, relevance, positive_part_(weighted).mean(1))

"""Norms of the decomposed vectors of every (query, key) pair, by the head-Gram identity.

    norm[i, j]^2 = rstd[i]^2 * (a^T G[j] a + (i == j) (2 a . c[i] + residual_sq[i]))
    a = alpha[:, i, j], a vector of H entries

(Modarressi et al., 2022, eq. 6 to 10, with the square expanded over heads.) A pair takes H*(dh + H)
multiply-adds and H exponentials. The work is tiled over keys so that a tile of probabilities holds about as
many numbers as the hidden states.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.masks import outside_window
from pyglobenc.backends.shared.rows import own_attention, positive_part_, take_queries


def run(inputs: PairInputs, rows: Tensor | None = None) -> Tensor:
    """See `pyglobenc.ops.pair_norms`: -> (B, n, n), or (B, T, n) with rows."""
    inputs = widened(inputs)
    diagonal = None if inputs.cross is None else diagonal_sq(inputs)
    q, key_mask, rstd = inputs.q, inputs.key_mask, inputs.rstd
    out = q.new_empty(q.shape[0], q.shape[2] if rows is None else rows.shape[1], q.shape[2])
    for start, sq in key_tiles(inputs, diagonal if rows is None else None, rows):
        out[:, :, start : start + sq.shape[1]] = sq.transpose(1, 2)
    if rows is not None and diagonal is not None:
        out.scatter_(2, rows[:, :, None], diagonal.gather(1, rows)[:, :, None])
    out = positive_part_(out).sqrt_()
    if rstd is not None:
        out *= (rstd if rows is None else rstd.gather(1, rows))[:, :, None]
    if key_mask is not None:
        out.masked_fill_(~key_mask[:, None, :], 0)
        out.masked_fill_(~(key_mask if rows is None else key_mask.gather(1, rows))[:, :, None], 0)
    return out


def widened(inputs: PairInputs) -> PairInputs:
    """Return the inputs with q (B, H, n, dh), k and lse in the dtype of gram."""
    dtype = inputs.gram.dtype
    return inputs.replace(q=inputs.q.to(dtype), k=inputs.k.to(dtype), lse=inputs.lse.to(dtype))


def diagonal_sq(inputs: PairInputs) -> Tensor:
    """Return the squared norm of each token's own vector, (B, n).

    It includes the residual but not the scale of the row.
    """
    a = own_attention(inputs.q, inputs.k, inputs.lse, inputs.scaling, inputs.score_mod).transpose(
        1, 2
    )  # (B, n, H)
    return (a * (torch.einsum("bnhg,bng->bnh", inputs.gram, a) + 2 * inputs.cross)).sum(
        -1
    ) + inputs.residual_sq


def key_tiles(
    inputs: PairInputs, diagonal: Tensor | None, rows: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield for each tile of J keys the first key, and the squared norms (B, J, m) for m queries.

    They do not include the scale of the row. Keys that are padding get 0.

    Args:
        inputs: tensors of the layer, in one dtype.
        diagonal: (B, n), the squared norm of each query with its own key, which replaces the computed one;
            None: nothing is replaced.
        rows: the queries, (B, m) int64; None: all.
    """
    q, k, lse, score_mod = inputs.q, inputs.k, inputs.lse, inputs.score_mod
    if rows is not None:
        q, lse = take_queries(q, rows), take_queries(lse, rows)
    (_, n_heads, m, dh), n = q.shape, k.shape[2]
    k = k.repeat_interleave(n_heads // k.shape[1], dim=1)
    modify = None if score_mod is None else score_mod.bind(q, k)
    i = torch.arange(m, device=q.device)[None] if rows is None else rows
    q = (q * inputs.scaling).transpose(2, 3)
    for start in range(0, n, block_of_keys(n, m, dh)):
        stop = min(n, start + block_of_keys(n, m, dh))
        alpha = torch.matmul(k[:, :, start:stop], q)  # (B, H, J, m)
        if modify is not None:
            alpha = modify(alpha.transpose(2, 3), slice(0, m), i, slice(start, stop)).transpose(2, 3)
        alpha.sub_(lse[:, :, None, :])
        hidden = outside_window(
            torch.arange(start, stop, device=q.device)[None, :, None] - i[:, None, :], inputs.window
        )
        if hidden is not None:
            alpha.masked_fill_(hidden[:, None], float("-inf"))
        alpha = alpha.exp_().transpose(1, 2)  # (B, J, H, m)
        sq = torch.matmul(inputs.gram[:, start:stop], alpha).mul_(alpha).sum(2)
        if diagonal is not None:
            torch.diagonal(sq[:, :, start:stop], dim1=1, dim2=2).copy_(diagonal[:, start:stop])
        if inputs.key_mask is not None:
            # lse does not include the scores of padded keys, so their exponential may be infinite.
            sq.masked_fill_(~inputs.key_mask[:, start:stop, None], 0)
        yield start, sq


def block_of_keys(n: int, m: int, dh: int) -> int:
    """Return the number of keys J of a tile, with at most as many probabilities H*J*m as values H*n*dh."""
    return max(1, min(n, n * dh // max(m, 1), 64))

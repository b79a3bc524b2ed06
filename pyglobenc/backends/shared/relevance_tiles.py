"""Tiles of a block of queries with all keys, for relevance through attention, and the use of their sums."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.masks import outside_window, visible_keys
from pyglobenc.backends.shared.rows import take_queries
from pyglobenc.backends.shared.safe_division import safe_divide
from pyglobenc.backends.shared.score_mods import ScoreMod

# Smaller blocks make slow GEMMs; larger ones no longer fit the cache.
TILE_FLOATS = 1 << 18
MIN_QUERIES = 16


def rescale_scores(r_q: Tensor, r_k: Tensor, total: Tensor, kept: Tensor) -> None:
    """Multiply R_q and R_k (B, H, n, dh) by the factor c of the additive mask, in place.

    This is the add rule with the mask as second branch. The mask's relevance is 0, since masked keys have
    alpha = 0. total and kept, (B,) float64, are the sums of R_alpha before and after the rule.
    """
    factor = safe_divide(safe_divide(kept.abs(), kept.abs()) * total, kept).to(r_q.dtype).view(-1, 1, 1, 1)
    r_q *= factor
    r_k *= factor


def roll_rows(r_out: Tensor, r: Tensor, tile: Any, row_sums: Tensor, normalize: bool) -> None:
    """Add a tile's share of r (I + A) to r_out (B, T, n), for r (B, T, n).

    With normalize, each row of I + A is divided by its sum; row_sums (B, I) are those of A.
    """
    weights = r[:, :, tile.rows]
    if normalize:
        weights = weights / (1 + row_sums)[:, None]
    r_out[:, :, tile.cols] += weights @ tile.weighted
    r_out[:, :, tile.rows] += weights


def collect_maps(tiles: Iterator[Any], inputs: RelevanceInputs, rows: Tensor | None) -> Tensor:
    """Return the map A of the queries of all tiles, (B, n, n), or (B, T, n) of the queries rows (B, T)."""
    batch, _, n, _ = inputs.q.shape
    out = inputs.q.new_zeros(batch, n if rows is None else rows.shape[1], n)
    for tile in tiles:
        out[:, tile.rows, tile.cols] = tile.weighted
    return out


def roll_out(tiles: Iterator[Any], r: Tensor, normalize: bool) -> Tensor:
    """Return r (I + A), (B, T, n), for r (B, T, n) and the map A of all tiles, as `roll_rows` adds it up."""
    out = r.new_zeros(r.shape)
    for tile in tiles:
        roll_rows(out, r, tile, tile.weighted.sum(-1), normalize)
    return out


def product(tiles: Iterator[Any], inputs: RelevanceInputs, r: Tensor, transposed: bool) -> Tensor:
    """Return r A, (B, T, m), or with transposed r A^T, (B, T, n), for the map A (B, n, m) of all tiles."""
    size = (inputs.q if transposed else inputs.k).shape[2]
    out = r.new_zeros(*r.shape[:2], size)
    for tile in tiles:
        if transposed:
            out[:, :, tile.rows] = r[:, :, tile.cols] @ tile.weighted.transpose(1, 2)
        else:
            out[:, :, tile.cols] += r[:, :, tile.rows] @ tile.weighted
    return out


def of_queries(
    inputs: RelevanceInputs, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q, lse, s and grad_o of the queries at positions (B, m); None: of all queries."""
    given = (inputs.q, inputs.lse, inputs.s, inputs.grad_o)
    return (
        given
        if positions is None
        else tuple(None if t is None else take_queries(t, positions) for t in given)
    )


def probability_tiles(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    positions: Tensor | None = None,
    score_mod: ScoreMod | None = None,
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield tiles of I queries with the J keys that they see: both ranges, q . k and alpha (B, H, I, J).

    Args:
        q: queries, (B, H, m, dh).
        k: keys, (B, H, n, dh).
        lse: log-sum-exp of the queries' scaled scores, (B, H, m).
        key_mask: (B, n) bool, True for real tokens, or None.
        scaling: factor of q . k.
        window: keys that a query sees, as `RelevanceInputs` has it.
        positions: position of each row of q among the n tokens, (B, m); None: row i is query i.
        score_mod: change of the scaled scores before the softmax, or None.
    """
    batch, heads, m, _ = q.shape
    n = k.shape[2]
    keys = k.transpose(2, 3)
    modify = None if score_mod is None else score_mod.bind(q, k)
    block = max(MIN_QUERIES, TILE_FLOATS // max(1, batch * heads * n))
    for start in range(0, m, block):
        rows = slice(start, min(m, start + block))
        cols = slice(0, n) if positions is not None else visible_keys(rows, n, window)
        dots = q[:, :, rows] @ keys[..., cols]
        i = (
            torch.arange(rows.start, rows.stop, device=q.device)[None]
            if positions is None
            else positions[:, rows]
        )
        alpha = torch.mul(dots, scaling)
        if modify is not None:
            alpha = modify(alpha, rows, i, cols)
        alpha.sub_(lse[:, :, rows, None])
        if max(window) >= 0:
            ahead = torch.arange(cols.start, cols.stop, device=q.device) - i[..., None]
            alpha.masked_fill_(outside_window(ahead, window)[:, None], float("-inf"))
        alpha.exp_()
        if key_mask is not None:
            # lse does not include the scores of masked keys, so their exponential may be infinite.
            alpha.masked_fill_(~key_mask[:, None, None, cols], 0)
        yield rows, cols, dots, alpha

"""Tiles that the relevance ops of attention share: torch's GEMMs, and what lies between them in one pass of C++."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels
from pyglobenc.backends.reference.relevance_attention import LEAST_QUERIES, TILE_FLOATS


@dataclass
class Tile:
    """Pairs of a block of queries with all keys."""

    rows: slice
    alpha: Tensor  # (B, H, I, n), only where sums are taken
    u: Tensor  # (B, H, I, n), only where sums are taken
    weighted: Tensor  # A, (B, I, n)


def query_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    rows: Tensor | None = None,
    additive_mask: bool = False,
    stabilizer: float = 0.0,
    sums: Tensor | None = None,
) -> Iterator[Tile]:
    """Blocks of queries against all keys.

    Args:
        rows: which query each of the m rows of q, lse, grad_o and s is, (B, m) int64; None: row i is query i.
        additive_mask, stabilizer: as for `pyglobenc.ops.relevance_attention`.
        sums: (B, 2) float64, to which the sums of R_alpha and of t R_alpha / safe(t) are added; None leaves alpha and U out.
        Others as for `pyglobenc.ops.relevance_attention`.

    Yields:
        tiles, of queries (B, H, I, dh) with all keys; alpha and u lie where those of the next tile will.
    """
    batch, heads, m, _ = q.shape
    n = k.shape[2]
    keys, values = k.transpose(2, 3), v.transpose(2, 3)
    block = min(m, max(LEAST_QUERIES, TILE_FLOATS // max(1, batch * heads * n)))
    # every tile where the last one was: what each returned could go back to the system, whose pages cost half of the time to get anew
    places = [q.new_empty(batch * heads * block * n) for _ in range(2 if grad_o is None else 3)]

    def product(slot: int, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a, b, out=places[slot][: batch * heads * a.shape[2] * n].view(batch, heads, a.shape[2], n))

    for start in range(0, m, max(1, block)):
        part = slice(start, min(m, start + block))
        dots, relevance = product(0, q[:, :, part], keys), product(1, s[:, :, part], values)
        gradient = None if grad_o is None else product(2, grad_o[:, :, part], values)
        weighted = q.new_empty(batch, part.stop - start, n)
        if weighted.numel():
            tensors = (dots, relevance, gradient, lse[:, :, part], weighted, key_mask, None if rows is None else rows[:, part])
            kernels.relevance_tile(tensors, start, scaling, window, additive_mask, stabilizer, sums, torch.get_num_threads())
        yield Tile(part, dots, relevance, weighted)

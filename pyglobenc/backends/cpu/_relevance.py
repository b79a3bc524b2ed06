"""Tiles that the ops with a whole map A share: torch's GEMMs, and one pass of C++ between them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.masks import visible_keys
from pyglobenc.backends.shared.relevance_tiles import MIN_QUERIES, TILE_FLOATS, of_queries


@dataclass
class FusedTile:
    """The pairs of a block of I queries with the J keys that their window reaches.

    Attributes:
        rows, cols: the ranges of the queries and of the keys.
        weighted: A, (B, I, J).
    """

    rows: slice
    cols: slice
    weighted: Tensor


def query_tiles(inputs: RelevanceInputs, positions: Tensor | None = None) -> Iterator[FusedTile]:
    """Yield the tiles of blocks of queries with the keys that they see.

    Args:
        inputs: tensors of the layer.
        positions: the queries, (B, m) int64; None: all.

    Yields:
        Tiles of I queries.
    """
    q, lse, s, grad_o = of_queries(inputs, positions)
    (batch, heads, m, _), n = q.shape, inputs.k.shape[2]
    keys, values = inputs.k.transpose(2, 3), inputs.v.transpose(2, 3)
    block = min(m, max(MIN_QUERIES, TILE_FLOATS // max(1, batch * heads * n)))
    # All tiles share this memory: allocating it anew for each would take half of the time.
    memory = [q.new_empty(batch * heads * block * n) for _ in range(2 if grad_o is None else 3)]

    def product(slot: int, a: Tensor, b: Tensor) -> Tensor:
        sizes = (batch, heads, a.shape[2], b.shape[3])
        return torch.matmul(a, b, out=memory[slot][: math.prod(sizes)].view(sizes))

    for start in range(0, m, max(1, block)):
        part = slice(start, min(m, start + block))
        cols = slice(0, n) if positions is not None else visible_keys(part, n, inputs.window)
        seen_keys, seen_values = keys[..., cols], values[..., cols]
        dots, relevance = product(0, q[:, :, part], seen_keys), product(1, s[:, :, part], seen_values)
        gradient = None if grad_o is None else product(2, grad_o[:, :, part], seen_values)
        weighted = q.new_empty(batch, part.stop - start, cols.stop - cols.start)
        if weighted.numel():
            own = None if positions is None else positions[:, part]
            mask = None if inputs.key_mask is None else inputs.key_mask[:, cols]
            tensors = (dots, relevance, gradient, lse[:, :, part], weighted, mask, own)
            rules = (inputs.scaling, inputs.window)
            kernels.relevance_tile(tensors, start - cols.start, *rules, torch.get_num_threads())
        yield FusedTile(part, cols, weighted)

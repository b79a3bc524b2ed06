"""Tiles that the relevance ops of attention share: torch's GEMMs, and one pass of C++ between them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.relevance_tiles import MIN_QUERIES, TILE_FLOATS, of_queries


@dataclass
class Tile:
    """The pairs of a block of I queries with all keys.

    Attributes:
        rows: the range of the queries.
        alpha: attention probabilities, (B, H, I, n), undefined without sums.
        u: U of `relevance_attention`, (B, H, I, n), undefined without sums.
        weighted: A, (B, I, n).
    """

    rows: slice
    alpha: Tensor
    u: Tensor
    weighted: Tensor


def query_tiles(
    inputs: RelevanceInputs, positions: Tensor | None = None, sums: Tensor | None = None
) -> Iterator[Tile]:
    """Yield the tiles of blocks of queries with all keys.

    Args:
        inputs: tensors of the layer.
        positions: the queries, (B, m) int64; None: all.
        sums: (B, 2) float64. The sums of R_alpha and of t R_alpha / safe(t) are added to it. None: alpha and
            U are not computed.

    Yields:
        Tiles of I queries with all keys. The next tile overwrites alpha and u.
    """
    q, lse, s, grad_o = of_queries(inputs, positions)
    (batch, heads, m, _), n = q.shape, inputs.k.shape[2]
    keys, values = inputs.k.transpose(2, 3), inputs.v.transpose(2, 3)
    block = min(m, max(MIN_QUERIES, TILE_FLOATS // max(1, batch * heads * n)))
    # All tiles share this memory: allocating it anew for each would take half of the time.
    memory = [q.new_empty(batch * heads * block * n) for _ in range(2 if grad_o is None else 3)]

    def product(slot: int, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(
            a, b, out=memory[slot][: batch * heads * a.shape[2] * n].view(batch, heads, a.shape[2], n)
        )

    for start in range(0, m, max(1, block)):
        part = slice(start, min(m, start + block))
        dots, relevance = product(0, q[:, :, part], keys), product(1, s[:, :, part], values)
        gradient = None if grad_o is None else product(2, grad_o[:, :, part], values)
        weighted = q.new_empty(batch, part.stop - start, n)
        if weighted.numel():
            own = None if positions is None else positions[:, part]
            tensors = (dots, relevance, gradient, lse[:, :, part], weighted, inputs.key_mask, own)
            rules = (inputs.scaling, inputs.window, inputs.additive_mask, inputs.stabilizer)
            kernels.relevance_tile(tensors, start, *rules, sums, torch.get_num_threads())
        yield Tile(part, dots, relevance, weighted)

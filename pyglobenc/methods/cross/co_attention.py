"""The bi-modal rules of Chefer, Gur and Wolf (ICCV 2021), by rows, where two streams attend to each other.

Streams 0 and 1 have maps A_s of their own attention and C_s of attention to the other stream o. R_st says
what the tokens of stream t contribute to those of stream s. First each stream sees itself alone, by eq. 6.
Then each layer of both streams changes, at once,

    R_so <- R_so + norm(R_ss)^T C_s norm(R_oo)      eq. 10
    R_ss <- R_ss + C_s R_os                         eq. 11

and after that R_st <- (I + A_s) R_st by eq. 6 and 7; norm is eq. 8 and 9. A row times these matrices goes
down the layers, and a matrix times a column goes up. Eq. 10 needs a column for each row, and a row for each
column, of the layers below. So the number of products with maps doubles with each such layer. LXMERT has 5 of
them and 34 maps, and takes 777 products. No matrix is stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.methods.cross.encoder_decoder import (
    AttentionMap,
    columns_less_identity,
    divided,
    rows_less_identity,
)

# A vector (B, 1, n) of each stream, or None for zeros.
Pair = list[Tensor | None]


class CoAttentionRules:
    """The matrices R_st after each number of layers, as functions of rows and columns.

    Args:
        alone: the maps of each stream's first layers, which attend to the stream alone.
        cross: C_s of each layer of both streams, for both streams, first layer first.
        own: A_s of these layers.
    """

    def __init__(
        self,
        alone: Sequence[Sequence[AttentionMap]],
        cross: Sequence[Sequence[AttentionMap]],
        own: Sequence[Sequence[AttentionMap]],
    ):
        self.alone, self.cross, self.own = alone, cross, own
        self._sums: dict[tuple[int, int], Tensor] = {}

    def rows(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows r R_00 (B, 1, n) and r R_01 (B, 1, m) after all layers, for r (B, 1, n)."""
        change, other = self._left(len(self.own[0]), [r, None], [r, None])
        return r + change, other

    def _left(self, layer: int, same: Pair, other: Pair) -> Pair:
        """Return same_0 (R_00 - I) + other_1 R_10, and other_0 R_01 + same_1 (R_11 - I), after a layer."""
        out: Pair = [None, None]
        if not layer:
            return [
                None if row is None else rows_less_identity(maps, row)
                for maps, row in zip(self.alone, same, strict=True)
            ]
        same, other, below = list(same), list(other), layer - 1
        for s in (0, 1):
            own = self.own[s][below]
            if same[s] is not None:
                added = own.before(same[s])
                out[s], same[s] = _sum(out[s], added), same[s] + added
            if other[s] is not None:
                other[s] = other[s] + own.before(other[s])
        next_same, next_other = list(same), list(other)
        for s, o in ((0, 1), (1, 0)):
            if same[s] is not None:
                next_other[o] = _sum(next_other[o], self.cross[s][below].before(same[s]))
            if other[s] is not None:
                column = self._normalized_column(below, s, other[s])
                y = self.cross[s][below].before(column)
                out[o] = _sum(out[o], y)
                next_same[o] = _sum(next_same[o], divided(y, self._row_sums(below, o, y)))
        for s, more in enumerate(self._left(below, next_same, next_other)):
            out[s] = _sum(out[s], more)
        return out

    def _right(self, layer: int, s: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (R_ss - I) x and R_os x after a layer, for a column x (B, 1, n) of stream s."""
        if not layer:
            return columns_less_identity(self.alone[s], x), None
        below, o = layer - 1, 1 - s
        change, to_other = self._right(below, s, x)
        # (norm(R_oo)^T C_o norm(R_ss)) x, where a transposed matrix times a column is a row times the matrix.
        column = x + divided(change, self._row_sums(below, s, x))
        row = self.cross[o][below].after(column)
        same: Pair = [None, None]
        same[o] = divided(row, self._row_sums(below, o, row))
        added = _sum(row, self._left(below, same, [None, None])[o])
        if to_other is not None:
            change = change + self.cross[s][below].after(to_other)
        to_other = _sum(to_other, added)
        change = change + self.own[s][below].after(x + change)
        return change, to_other + self.own[o][below].after(to_other)

    def _normalized_column(self, layer: int, s: int, x: Tensor) -> Tensor:
        """Return norm(R_ss) x, (B, 1, n)."""
        return x + divided(self._right(layer, s, x)[0], self._row_sums(layer, s, x))

    def _row_sums(self, layer: int, s: int, like: Tensor) -> Tensor:
        """Return the row sums of R_ss - I after a layer, (B, 1, n), of the shape of `like`."""
        if (layer, s) not in self._sums:
            self._sums[layer, s] = self._right(layer, s, torch.ones_like(like))[0]
        return self._sums[layer, s]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other

"""The rules of Chefer, Gur and Wolf (ICCV 2021) for an encoder and a decoder that attends to it, by rows.

With A_l the decoder's self-attention maps, C_l its cross-attention maps and E_l the encoder's maps, each the
mean over heads of max(alpha * grad_alpha, 0):

    E = (I + E_M) ... (I + E_1)                          eq. 6
    S_l = (I + A_l) S_(l-1),   X_l' = (I + A_l) X_(l-1)  eq. 6 and 7
    X_l = X_l' + norm(S_l)^T C_l norm(E)                 eq. 10
    norm(R) = (R - I) / rowsum(R - I) + I                eq. 8 and 9

S says what decoder tokens contribute to decoder tokens, X what source tokens contribute. The encoder never
sees the decoder, so eq. 11 adds nothing. A row of R - I that is 0 stays 0 in norm(R), where the published
code divides 0 by 0. Row t of S and of X needs no matrix. With r_L the unit row t:

    r_(l-1) = r_l (I + A_l)                                      down the decoder; r_0 is row t of S
    y = sum_l (norm(S_l) r_l^T)^T C_l                            up the decoder, all vectors in one pass
    row t of X = y norm(E) = y + (y / rowsum(E - I)) (E - I)     up the encoder for the sums, and down

R - I is accumulated without the identity, so that small gradients lose no digits. A pass over the pairs of
the decoder is made down and up, of the cross attention down, and of the encoder up and down.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglobenc.backends.shared.score_mods import to_dtype
from pyglobenc.hf.streams.capture import AttentionTrace
from pyglobenc.ops import relevance_product


@dataclass(frozen=True)
class AttentionMap:
    """The map A (B, n, m) of one attention, which is never stored.

    Attributes:
        attention: the captured tensors.
        grad: the gradient of the explained value with respect to the attention's output, (B, H, n, dh).
        dtype: float32 or float64, of the arithmetic.
        backend: as for the ops.
    """

    attention: AttentionTrace
    grad: Tensor
    dtype: torch.dtype
    backend: str

    def before(self, r: Tensor) -> Tensor:
        """Return r A, (B, T, m), for r (B, T, n)."""
        return self._product(r, False)

    def after(self, u: Tensor) -> Tensor:
        """Return A u for each of the vectors u (B, T, m), as (B, T, n)."""
        return self._product(u, True)

    def _product(self, r: Tensor, transposed: bool) -> Tensor:
        one = self.attention
        tensors = (t.detach().to(self.dtype) for t in (one.q, one.k, one.v, one.lse, self.grad))
        return relevance_product(
            r.to(self.grad.device),
            *tensors,
            transposed=transposed,
            key_mask=one.key_mask,
            scaling=one.scaling,
            window=one.window,
            score_mod=None if one.score_mod is None else to_dtype(one.score_mod, self.dtype),
            backend=self.backend,
        )


def self_attention_rows(maps: Sequence[AttentionMap], r: Tensor) -> Tensor:
    """Return r (I + A_L) ... (I + A_1), (B, T, n), for rows r (B, T, n) and maps, first layer first."""
    return r + rows_less_identity(maps, r)


def encoder_decoder_rows(
    encoder: Sequence[AttentionMap],
    own: Sequence[AttentionMap],
    cross: Sequence[AttentionMap],
    r: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return rows of S and of X; the module's docstring defines both.

    Args:
        encoder: the encoder's maps E_l, (B, m, m), first layer first.
        own: the decoder's self-attention maps A_l, (B, n, n).
        cross: the decoder's cross-attention maps C_l, (B, n, m).
        r: unit rows, or their means, (B, T, n).

    Returns:
        Rows of S, (B, T, n), and of X, (B, T, m).
    """
    above, rows = [], r
    for one in reversed(own):
        above.append(rows)
        rows = rows + one.before(rows)
    above.reverse()
    y = 0
    for one, column in zip(cross, _normalized_columns(own, above), strict=True):
        y = y + one.before(column)
    return rows, _normalized_rows(encoder, y)


def rows_less_identity(maps: Sequence[AttentionMap], r: Tensor) -> Tensor:
    """Return r (R - I), (B, T, n), for R = (I + A_L) ... (I + A_1)."""
    change = torch.zeros_like(r)
    for one in reversed(maps):
        change = change + one.before(r + change)
    return change


def columns_less_identity(maps: Sequence[AttentionMap], columns: Tensor) -> Tensor:
    """Return (R - I) times columns (B, T, n), for R = (I + A_L) ... (I + A_1)."""
    change = torch.zeros_like(columns)
    for one in maps:
        change = change + one.after(columns + change)
    return change


def _normalized_rows(maps: Sequence[AttentionMap], y: Tensor) -> Tensor:
    """Return y norm(R), (B, T, n), for y (B, T, n)."""
    sums = columns_less_identity(maps, torch.ones_like(y[:, :1]))
    return y + rows_less_identity(maps, divided(y, sums))


def _normalized_columns(maps: Sequence[AttentionMap], columns: Sequence[Tensor]) -> list[Tensor]:
    """Return norm(S_l) times the columns (B, T, n) of each layer l, for S_l = (I + A_l) ... (I + A_1)."""
    targets = columns[0].shape[1]
    given = torch.cat([torch.ones_like(columns[0][:, :1]), *columns], 1)
    change, out = torch.zeros_like(given), []
    for one, column in zip(maps, columns, strict=True):
        change = change + one.after(given + change)
        out.append(column + divided(change[:, 1 : 1 + targets], change[:, :1]))
        # The vectors of this layer are complete.
        keep = [0, *range(1 + targets, given.shape[1])]
        given, change = given[:, keep], change[:, keep]
    return out


def divided(t: Tensor, sums: Tensor) -> Tensor:
    """Return t / sums, with 0 where a sum is 0."""
    return torch.where(sums > 0, t / torch.where(sums > 0, sums, 1), 0)

"""L1 proximity of each key's vectors to the values of rows (Ferrando et al., 2022).

    p[t, j] = max(0, |y[t]|_1 - |y[t] - F|_1),   F = sum_h alpha[h, t, j] f[h, j]

The op takes T*n*d*H multiply-adds, and n*d^2 for f.
"""

from torch import Tensor

from pyglobenc.backends.shared.proximity_tiles import by_keys, nearer
from pyglobenc.backends.shared.rows import positive_part_


def run(alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, per_head: bool) -> Tensor:
    """See `pyglobenc.ops.proximity`: -> (B, T, n), or (B, H, T, n) with per_head."""
    return by_keys(_fill, alpha, v, weight, y, per_head)


def _fill(alpha: Tensor, f: Tensor, y: Tensor, out: Tensor) -> None:
    """Fill out (B, T, J) for alpha (B, H, T, J), f (B, H, J, d) and y (B, T, d)."""
    f, step = f.transpose(1, 2), f.shape[1]
    # With as many rows as heads, the decomposed vectors have as many entries as f.
    for start in range(0, y.shape[1], step):
        rows = slice(start, start + step)
        vectors = alpha[:, :, rows].permute(0, 3, 2, 1) @ f  # (B, J, rows, d)
        out[:, rows] = positive_part_(nearer(vectors, y[:, None, rows])).transpose(1, 2)
    # A key without factors adds nothing, even if its vectors hold NaN.
    out.masked_fill_((alpha == 0).all(1), 0)

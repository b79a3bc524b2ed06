"""Which keys a query does not see: the window and the padding, for every backend."""

import torch
from torch import Tensor


def sides(window: tuple[int, int], n: int) -> tuple[int, int]:
    """Return the window (left, right) with n in place of unlimited sides."""
    left, right = (n if side < 0 else min(side, n) for side in window)
    return left, right


def visible_keys(rows: slice, n: int, window: tuple[int, int]) -> slice:
    """Return the range of keys that at least one of the queries `rows` sees through the window."""
    left, right = window
    return slice(0 if left < 0 else max(0, rows.start - left), n if right < 0 else min(n, rows.stop + right))


def outside_window(ahead: Tensor, window: tuple[int, int]) -> Tensor | None:
    """Return which pairs lie outside the window, bool, the shape of ahead.

    ahead: distances j - i of keys from queries, any shape. Returns None if the window is unlimited.
    """
    left, right = window
    if left < 0 and right < 0:
        return None
    if left < 0:
        return ahead > right
    return ahead < -left if right < 0 else (ahead < -left) | (ahead > right)


def hidden_keys(
    rows: slice, cols: slice, window: tuple[int, int], key_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return the pairs that the window or padding hides, bool (1 or B, 1, m, J); None if nothing is hidden.

    rows and cols are the ranges of the m queries and of the J keys; key_mask is (B, n) bool or None.
    """
    hidden = None
    if max(window) >= 0:
        ahead = (
            torch.arange(cols.start, cols.stop, device=device)
            - torch.arange(rows.start, rows.stop, device=device)[:, None]
        )
        hidden = outside_window(ahead, window)[None, None]
    if key_mask is not None:
        padded = ~key_mask[:, None, None, cols]
        hidden = padded if hidden is None else hidden | padded
    return hidden

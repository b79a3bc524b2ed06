"""Attention and its log-sum-exp, plain, a block of queries at a time: scores of QUERY_BLOCK queries exist at once."""

import torch
from torch import Tensor

from pyglobenc.backends.shared.score_mods import ScoreMod

QUERY_BLOCK = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pyglobenc.ops.attention`: -> o (B, H, n, dh), lse (B, H, n)."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    modify = None if score_mod is None else score_mod.bind(q, k)
    outs, lses = [], []
    for start in range(0, n, QUERY_BLOCK):
        rows = slice(start, min(n, start + QUERY_BLOCK))
        cols = visible_keys(rows, n, window)
        scores = q[:, :, rows] @ k[:, :, cols].transpose(2, 3) * scaling
        if modify is not None:
            scores = modify(scores, rows, torch.arange(n, device=q.device)[None, rows], cols)
        hidden = hidden_keys(rows, cols, window, key_mask, q.device)
        if hidden is not None:
            # finite, so that a query that sees no key doesn't divide by zero
            scores = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min / 2)
        # one pass of exponentials for both results
        top = scores.detach().amax(-1, keepdim=True)
        p = scores.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        lses.append((top + total.log())[..., 0])
        outs.append(p @ v[:, :, cols] / total)
    if not outs:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3])
    return torch.cat(outs, 2), torch.cat(lses, 2)


def sides(window: tuple[int, int], n: int) -> tuple[int, int]:
    """A window with n for unlimited."""
    left, right = (n if side < 0 else min(side, n) for side in window)
    return left, right


def visible_keys(rows: slice, n: int, window: tuple[int, int]) -> slice:
    """Keys that any of the queries `rows` sees through the window."""
    left, right = window
    return slice(0 if left < 0 else max(0, rows.start - left), n if right < 0 else min(n, rows.stop + right))


def hidden_keys(rows: slice, cols: slice, window: tuple[int, int], key_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Pairs outside the window or with a padded key, bool (1 or B, 1, m, J); None if there are none."""
    hidden, (left, right) = None, window
    if left >= 0 or right >= 0:
        ahead = torch.arange(cols.start, cols.stop, device=device) - torch.arange(rows.start, rows.stop, device=device)[:, None]
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if left >= 0:
            hidden |= ahead < -left
        if right >= 0:
            hidden |= ahead > right
        hidden = hidden[None, None]
    if key_mask is not None:
        padded = ~key_mask[:, None, None, cols]
        hidden = padded if hidden is None else hidden | padded
    return hidden

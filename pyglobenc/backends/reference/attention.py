"""Attention and its log-sum-exp, for QUERY_BLOCK queries at a time."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyglobenc.backends.shared.masks import hidden_keys, visible_keys
from pyglobenc.backends.shared.score_mods import ScoreMod

QUERY_BLOCK = 64
# An autograd graph stores the probabilities of texts up to this length, which take H * 16 MB in float32 for
# each layer. Those of longer texts are computed again in the backward pass, so that memory is linear in n.
STORED = 2048


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
    n, m, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    modify = None if score_mod is None else score_mod.bind(q, k)

    def block(start: int) -> tuple[Tensor, Tensor]:
        rows = slice(start, min(n, start + QUERY_BLOCK))
        cols = visible_keys(rows, m, window)
        scores = q[:, :, rows] @ k[:, :, cols].transpose(2, 3) * scaling
        if modify is not None:
            scores = modify(scores, rows, torch.arange(n, device=q.device)[None, rows], cols)
        hidden = hidden_keys(rows, cols, window, key_mask, q.device)
        if hidden is not None:
            # The value is finite, so that a query that sees no key does not divide by zero.
            scores = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min / 2)
        # Both results share one pass of exponentials.
        top = scores.detach().amax(-1, keepdim=True)
        p = scores.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        return p @ v[:, :, cols] / total, (top + total.log())[..., 0]

    def whole(start: int) -> tuple[Tensor, Tensor]:
        # A TorchFunctionMode that is active in the backward pass must not see the operations again.
        with torch._C.DisableTorchFunction():
            return block(start)

    if not n:
        return torch.zeros_like(q), q.new_zeros(q.shape[:3])
    starts = range(0, n, QUERY_BLOCK)
    if max(n, m) > STORED and torch.is_grad_enabled():
        again = dict(use_reentrant=False, preserve_rng_state=False)
        blocks = [checkpoint(whole, start, **again) for start in starts]
    else:
        blocks = [block(start) for start in starts]
    return torch.cat([o for o, _ in blocks], 2), torch.cat([lse for _, lse in blocks], 2)

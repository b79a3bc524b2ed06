"""Blocks of keys for the op `proximity`, whose kernels take the heads' transformed vectors."""

from collections.abc import Callable

import torch
from torch import Tensor

# The smallest number of keys whose vectors exist at a time. It is larger if they still have no more entries
# than the hidden states.
MIN_KEYS = 32
# The same on a GPU: enough programs to fill it, and 9 MB for BERT-base.
GPU_KEYS = 256


def by_keys(
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    alpha: Tensor,
    v: Tensor,
    weight: Tensor,
    y: Tensor,
    per_head: bool,
    least: int = MIN_KEYS,
) -> Tensor:
    """Call a kernel for each block of J keys, and return what it has written.

    Args:
        kernel: function of alpha (B, H, T, J), f (B, H, J, d), y (B, T, d) and its result (B, T, J), which it
            fills. The features of f and y are contiguous. With per_head it gets each head as an example of
            its own, so that H is 1.
        alpha, v, weight, y, per_head: as for `pyglobenc.ops.proximity`.
        least: the smallest number of keys of a block.

    Returns:
        (B, T, n), or (B, H, T, n) with per_head.
    """
    heads, (batch, kv_heads, n, _) = len(weight), v.shape
    out = weight.new_empty((batch, heads, y.shape[1], n) if per_head else (batch, y.shape[1], n))
    y = y.contiguous()
    if per_head:
        y = y[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
    for start in range(0, n if out.numel() else 0, block := max(least, -(-n // heads))):
        keys = slice(start, min(n, start + block))
        values = v[:, :, keys].to(weight.dtype).repeat_interleave(heads // kv_heads, dim=1)
        # The examples are joined, because a broadcast product would copy the weight for each of them.
        f = torch.matmul(values.transpose(0, 1).flatten(1, 2), weight)
        f = f.unflatten(1, (batch, -1)).transpose(0, 1)
        seen, to = alpha[..., keys], out[..., keys]
        if per_head:
            seen, f, to = seen.flatten(0, 1)[:, None], f.flatten(0, 1)[:, None], to.flatten(0, 1)
        kernel(seen, f, y, to)
    return out


def nearer(vectors: Tensor, values: Tensor) -> Tensor:
    """Return |y|_1 - |y - F|_1 over the last axis, for vectors F and values y whose shapes broadcast.

    With s = F where y >= 0 and s = -F elsewhere, each feature adds min(s, 2 |y| - s). In this form the
    rounding error depends on F and not on the larger y.
    """
    signed = torch.where(values < 0, -vectors, vectors)
    return torch.minimum(signed, 2 * values.abs() - signed).sum(-1)

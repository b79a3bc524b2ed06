"""Random arguments of the relevance ops of attention, and their map computed from materialised arrays."""

import torch

from pyglobenc.ops import attention


def inputs(n, dtype=torch.float64, pads=0, heads=3, dh=8):
    q, k, v, grad_o, s = (torch.randn(2, heads, n, dh, dtype=dtype) for _ in range(5))
    mask = None
    if pads:
        mask = torch.ones(2, n, dtype=torch.bool)
        mask[1, n - pads :] = False
    _, lse = attention(q, k, v, key_mask=mask)
    return dict(q=q, k=k, v=v, lse=lse, grad_o=grad_o, s=s), mask


def exact_map(t, mask):
    """Return mean_h max(<grad_o, v> R_alpha, 0), (B, n, n), from materialised arrays."""
    scores = t["q"] @ t["k"].transpose(2, 3) * t["q"].shape[3] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    values = t["v"].transpose(2, 3)
    relevance = scores.softmax(-1) * (t["s"] @ values) / 2
    weighted = relevance if t["grad_o"] is None else relevance * (t["grad_o"] @ values)
    return weighted.clamp(min=0).mean(1)

"""Norms of the transformed vectors f[h, j] = v[h, j] W_O[h] (Kobayashi et al., 2020, eq. 5). Cost n*d^2 multiply-adds, n*d floats."""

import torch
from torch import Tensor


def head_norms(v: Tensor, weight: Tensor) -> Tensor:
    """See `pyglobenc.ops.head_norms`: v (B, Hkv, n, dh), weight (H, dh, d) -> (B, n, H)."""
    group = weight.shape[0] // v.shape[1]
    norms = [(v[:, h // group] @ weight[h]).norm(dim=-1) for h in range(weight.shape[0])]
    return torch.stack(norms, dim=-1)

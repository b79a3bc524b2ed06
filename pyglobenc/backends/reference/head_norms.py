"""Norms of the transformed vectors f[h, j] = v[h, j] W_O[h] (Kobayashi et al., 2020, eq. 5).

They take n*d^2 multiply-adds and n*d floats of memory.
"""

import torch
from torch import Tensor


def run(v: Tensor, weight: Tensor) -> Tensor:
    """See `pyglobenc.ops.head_norms`: v (B, Hkv, n, dh), weight (H, dh, d) -> (B, n, H)."""
    group = weight.shape[0] // v.shape[1]
    return torch.stack([vector_norms(v[:, h // group] @ weight[h]) for h in range(weight.shape[0])], dim=-1)


def vector_norms(f: Tensor) -> Tensor:
    """Return the norms of f (*, d) over its last axis, in the dtype of f.

    The squares are computed in float64, because those of float32 numbers can lie outside its range.
    """
    return torch.linalg.vector_norm(f, dim=-1, dtype=torch.float64).to(f.dtype)

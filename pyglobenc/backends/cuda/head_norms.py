"""Norms of the transformed vectors, which are never stored: csrc/cuda/head_norms.cu."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._pairs import in_pieces
from pyglobenc.backends.cuda._relevance import float32_reasons


def why_not(v: Tensor, weight: Tensor) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.head_norms` can't run here; empty if they can."""
    return float32_reasons(v=v, weight=weight)


def run(v: Tensor, weight: Tensor) -> Tensor:
    """See `pyglobenc.ops.head_norms`: v (B, Hkv, n, dh), weight (H, dh, d) -> (B, n, H)."""
    out = torch.empty(v.shape[0], v.shape[2], weight.shape[0], device=v.device)
    if out.numel() == 0 or v.shape[3] == 0:
        return out.zero_()
    with _extension.launching(v.device) as stream:
        tensors = (in_pieces(v), weight.contiguous(), None, None, out, None)
        _extension.kernels.head_norms(tensors, not _extension.allows_tf32(), stream)
    return out

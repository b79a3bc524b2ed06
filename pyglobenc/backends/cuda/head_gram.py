"""Gram matrices over heads of the transformed vectors, which are never formed: csrc/cuda/head_gram.cu."""

import torch
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._pairs import in_pieces
from pyglobenc.backends.cuda._relevance import float32_reasons


def why_not(
    v: Tensor, kernel: Tensor, x: Tensor | None = None, cross_kernel: Tensor | None = None
) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.head_gram` can't run here; empty if they can."""
    return float32_reasons({"v": v, "x": x}, kernel=kernel, cross_kernel=cross_kernel)


def run(
    v: Tensor, kernel: Tensor, x: Tensor | None = None, cross_kernel: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `pyglobenc.ops.head_gram`: -> G (B, n, H, H), c (B, n, H) or None."""
    (batch, _, n, head_dim), heads = v.shape, kernel.shape[0]
    gram = torch.empty(batch, n, heads, heads, device=v.device)
    cross = None if x is None else torch.empty(batch, n, heads, device=v.device)
    if gram.numel() == 0 or head_dim == 0:
        return gram.zero_(), cross if cross is None else cross.zero_()
    if x is not None:
        x, cross_kernel = in_pieces(x), cross_kernel.contiguous()
    with _extension.launching(v.device) as stream:
        tensors = (in_pieces(v), kernel.contiguous(), x, cross_kernel, gram, cross)
        _extension.kernels.head_gram(tensors, not _extension.allows_tf32(), stream)
    return gram, cross

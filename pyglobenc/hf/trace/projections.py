"""Tensors along one fixed direction, by which `pyglobenc.hf.trace.checks` compares them."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyglobenc.backends.shared.launch import HALF


class Directions(dict[tuple[int, torch.dtype, torch.device], Tensor]):
    """The direction u (d,) by its size, dtype and device, made where it is first needed."""

    def __missing__(self, key: tuple[int, torch.dtype, torch.device]) -> Tensor:
        d, dtype, device = key
        k = torch.arange(1, d + 1, dtype=torch.float64, device=device)
        # sines of squares have no period and no trend, and are the same on every device and at every call
        self[key] = u = torch.sin(k * k).mul_(2**0.5).to(dtype)
        return u

    def of(self, t: Tensor) -> Tensor:
        """The direction for t (..., d), of float32 or float64."""
        return self[t.shape[-1], t.dtype, t.device]


class Projection(NamedTuple):
    """A tensor (B, n, d) along the direction."""

    product: Tensor  # (B, n)
    length: Tensor | None  # (B, n), of the tensor's tokens
    eps: float  # of the tensor's dtype

    def followed_by(self, more: "Projection") -> "Projection":
        """The projection of these tokens and of more that come after them."""
        length = None if self.length is None else torch.cat([self.length, more.length], 1)
        return Projection(torch.cat([self.product, more.product], 1), length, max(self.eps, more.eps))


def wide(t: Tensor) -> Tensor:
    """A tensor outside the autograd graph, float32 at least."""
    t = t.detach()
    return t.float() if t.dtype in HALF else t


def project(
    t: Tensor, directions: Directions, length: bool = False, weight: Tensor | None = None
) -> Projection:
    """Project t (B, n, d) on the direction, or on the direction times weight (d,); with the tokens' lengths
    where asked for.
    """
    eps, t = torch.finfo(t.dtype).eps, wide(t)
    u = directions.of(t)
    product = t @ (u if weight is None else u * weight.to(t.dtype))
    return Projection(product, torch.linalg.vector_norm(t, dim=-1) if length else None, eps)

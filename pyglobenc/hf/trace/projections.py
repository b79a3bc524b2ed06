"""Projects tensors on one fixed direction, so that `pyglobenc.hf.trace.checks` can compare them."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import load
from pyglobenc.backends.shared.launch import HALF

# One pass over a tensor on the CPU, where torch takes three; None without the compiled module.
KERNEL = load("projection", "cpu")[0]


class Projection(NamedTuple):
    """The projection of a tensor (B, n, d) on the direction."""

    product: Tensor  # (B, n)
    length: Tensor | None  # (B, n), L2 norms of the tokens; None if not needed

    def followed_by(self, more: "Projection") -> "Projection":
        """Return the projection of these tokens, followed by that of the tokens in `more`."""
        length = None if self.length is None else torch.cat([self.length, more.length], 1)
        return Projection(torch.cat([self.product, more.product], 1), length)


class Directions(dict[tuple[int, torch.dtype, torch.device], Tensor]):
    """The direction u (d,) for each size, dtype and device, created when it is first needed.

    Attributes:
        eps: machine epsilon of the coarsest dtype among the tensors that were projected.
    """

    eps = 0.0

    def __missing__(self, key: tuple[int, torch.dtype, torch.device]) -> Tensor:
        d, dtype, device = key
        k = torch.arange(1, d + 1, dtype=torch.float64, device=device)
        # sin(k^2) has no period and no trend, and is the same on every device and in every call.
        self[key] = u = torch.sin(k * k).mul_(2**0.5).to(dtype)
        return u

    def of(self, t: Tensor) -> Tensor:
        """Return the direction for a tensor t (..., d) of float32 or float64."""
        return self[t.shape[-1], t.dtype, t.device]

    def project(self, t: Tensor, length: bool = False, weight: Tensor | None = None) -> Projection:
        """Project a tensor on the direction.

        Args:
            t: (B, n, d), or (B, H, n, dh) by head with d = H * dh, floating point.
            length: also compute the L2 norms of the tokens.
            weight: (d,); t is projected on weight * u instead of u.

        Returns:
            Projection, with product and length (B, n) in float32 or float64.
        """
        self.eps = max(self.eps, torch.finfo(t.dtype).eps)
        d, dtype = t.shape[-1] if t.dim() == 3 else t.shape[1] * t.shape[3], self._arithmetic(t.dtype)
        u = self[d, dtype, t.device]
        u = u if weight is None else u * weight.detach().to(dtype)
        if KERNEL is not None and not KERNEL.why_not(t, u):
            return Projection(*KERNEL.run(t, u, length))
        t = wide(t if t.dim() == 3 else t.transpose(1, 2).flatten(2))
        return Projection(t @ u, torch.linalg.vector_norm(t, dim=-1) if length else None)

    @staticmethod
    def _arithmetic(dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if dtype in HALF else dtype


def wide(t: Tensor) -> Tensor:
    """Return a tensor, such as (B, n, d), outside the autograd graph; half precision becomes float32."""
    t = t.detach() if t.requires_grad else t
    return t.float() if t.dtype in HALF else t

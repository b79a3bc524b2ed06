"""Relevance through a Linear layer: torch's GEMMs, and C++ passes around them.

The passes are in csrc/cpu/linear_relevance.cpp. Nearly dead outputs are left out of the GEMMs and computed as
in the reference.
"""

from functools import cached_property

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, single
from pyglobenc.backends.shared.dead_outputs import DEAD, MAX_DEAD, add_single_outputs, clamped_relevance
from pyglobenc.common.deferred import may_look

# With fewer rows, packing the weight takes longer than torch's product. With fewer terms or columns, a sum of
# products of parts is rounded more often than torch's.
FEW = 64
TILE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(r, x, weight, abs_weight=None, output=None, bias=None) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.linear_relevance` can't run here; empty if they can."""
    return single(*(t for t in (r, x, output) if t is not None))


def run(
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    abs_weight: Tensor | None = None,
    output: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `pyglobenc.ops.linear_relevance`: -> (B, n, d_in)."""
    r, x = r.contiguous(), x.contiguous()
    products = Products(weight, abs_weight, x.dtype)
    if not may_look():
        return clamped_relevance(r, x, products.signed)
    bound = products.bound(x)
    if output is None:
        output, bias = products.forward(x), None
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    # The quotient overwrites the bound.
    s, dead = bound, r.new_empty(r.shape, dtype=torch.bool)
    count = 0
    if r.numel():
        args = (r, output.contiguous(), bias, bound, DEAD[x.dtype], s, dead)
        count = kernels.linear_quotient(*args, torch.get_num_threads())
    if count > MAX_DEAD * dead.numel():
        return clamped_relevance(r, x, products.signed)
    signed, absolute = products.backward(s)
    kernels.linear_product(x, signed, absolute, signed, x.numel(), torch.get_num_threads())
    if count:
        add_single_outputs(signed, dead, r, x, products.signed)
    return signed


class Products:
    """The products with W (d_out, d_in) and |W|, on tile registers where the processor has them.

    The tile registers take the parts of W as they pack it, so that no copy of W or |W| is made.
    """

    def __init__(self, weight: Tensor, abs_weight: Tensor | None, dtype: torch.dtype):
        self.weight, self.abs_weight, self.dtype = weight, abs_weight, dtype

    @cached_property
    def signed(self) -> Tensor:
        """W (d_out, d_in) in the dtype of the products, converted once."""
        return self.weight.to(self.dtype)

    @cached_property
    def absolute(self) -> Tensor:
        """|W| (d_out, d_in) in the dtype of the products."""
        return self.signed.abs() if self.abs_weight is None else self.abs_weight.to(self.dtype)

    def bound(self, x: Tensor) -> Tensor:
        """Return |x| |W|^T, (B, n, d_out)."""
        out = self._tiles(x, self.weight.T, 1, absolute=True)
        return x.abs() @ self.absolute.T if out is None else out[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, (B, n, d_out)."""
        out = self._tiles(x, self.weight.T, 1)
        return x @ self.signed.T if out is None else out[0]

    def backward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return s W and s |W|, (B, n, d_in) each."""
        out = self._tiles(s, self.weight, 2)
        return (s @ self.signed, s @ self.absolute) if out is None else (out[0], out[1])

    def _tiles(self, a: Tensor, b: Tensor, copies: int, absolute: bool = False) -> Tensor | None:
        """Return a b, and a |b| as a second copy, (copies, B, n, columns); None if tiles don't suit them."""
        rows = a.numel() // a.shape[-1] if a.numel() else 0
        if (
            min(rows, *b.shape) < FEW
            or a.dtype != torch.float32
            or b.dtype not in TILE_DTYPES
            or min(b.stride()) != 1
        ):
            return None
        out = a.new_empty(copies, *a.shape[:-1], b.shape[1])
        flat = a.view(rows, a.shape[-1])
        fits = kernels.matmul(flat, absolute, b, absolute, out, torch.get_num_threads())
        return out if fits else None

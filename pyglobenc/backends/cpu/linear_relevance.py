"""Relevance through a Linear layer: torch's GEMMs, and C++ passes around them.

The passes are in csrc/cpu/linear_relevance.cpp. Nearly dead outputs are left out of the GEMMs and computed as
in the reference.
"""

import torch
from torch import Tensor

from pyglobenc.backends.cpu._extension import kernels, single
from pyglobenc.backends.shared.dead_outputs import DEAD, MAX_DEAD, add_single_outputs, clamped_relevance
from pyglobenc.common.deferred import may_look


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
    r, x, weight = r.contiguous(), x.contiguous(), weight.to(x.dtype)
    if not may_look():
        return clamped_relevance(r, x, weight)
    abs_weight = weight.abs() if abs_weight is None else abs_weight.to(x.dtype)
    bound = x.abs() @ abs_weight.T
    if output is None:
        output, bias = x @ weight.T, None
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    # The quotient overwrites the bound.
    s, dead = bound, r.new_empty(r.shape, dtype=torch.bool)
    count = 0
    if r.numel():
        args = (r, output.contiguous(), bias, bound, DEAD[x.dtype], s, dead)
        count = kernels.linear_quotient(*args, torch.get_num_threads())
    if count > MAX_DEAD * dead.numel():
        return clamped_relevance(r, x, weight)
    out = s @ weight
    kernels.linear_product(x, out, s @ abs_weight, out, x.numel(), torch.get_num_threads())
    if count:
        add_single_outputs(out, dead, r, x, weight)
    return out

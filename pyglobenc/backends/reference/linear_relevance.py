"""Relevance through a Linear layer with alpha = 1 and beta = 0; the bias gets none.

This is the Linear module of the published code (Chefer et al., 2021, eq. 5).

    Z = x+ W+^T + x- W-^T,   S = R / safe(Z),   R_in = x+ (S W+) + x- (S W-)

With absolute values the rule needs plain GEMMs and no clamped copies: Z = (x W^T + |x| |W|^T) / 2 and
R_in = (x (S W) + |x| (S |W|)) / 2. Since x W^T is known from the forward pass, that takes 3 n d_in d_out
multiply-adds.

Where nearly all contributions to an output are negative, the two terms of Z cancel and lose digits. The
clamped sum has only positive terms and keeps them, so such outputs are computed in the clamped form. If many
outputs are of this kind, or if their number must not be read because a CUDA graph is being recorded, all
outputs are computed in the clamped form, with four GEMMs.
"""

import torch
from torch import Tensor

from pyglobenc.backends.shared.dead_outputs import DEAD, MAX_DEAD, add_single_outputs, clamped_relevance
from pyglobenc.backends.shared.safe_division import safe_divide
from pyglobenc.common.deferred import may_look


def run(
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    abs_weight: Tensor | None = None,
    output: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `pyglobenc.ops.linear_relevance`: -> (B, n, d_in)."""
    weight = weight.to(x.dtype)
    if not may_look():
        return clamped_relevance(r, x, weight)
    abs_weight = weight.abs() if abs_weight is None else abs_weight.to(x.dtype)
    abs_x = x.abs()
    bound = abs_x @ abs_weight.T
    z = (x @ weight.T if output is None else output) + bound
    if output is not None and bias is not None:
        bias = bias.to(x.dtype)
        z.sub_(bias)
        bound.add_(bias.abs())
    z.mul_(0.5)
    dead = None
    lost = torch.sub(z, bound, alpha=DEAD[x.dtype])
    if lost.numel() and lost.min() < 0:
        dead = (lost < 0) & (r != 0)
        if dead.sum() > MAX_DEAD * dead.numel():
            return clamped_relevance(r, x, weight)
    s = safe_divide(r, z)
    if dead is not None:
        s.masked_fill_(dead, 0)
    out = (s @ weight).mul_(x)
    out.addcmul_(s @ abs_weight, abs_x).mul_(0.5)
    if dead is not None:
        add_single_outputs(out, dead, r, x, weight)
    return out

"""Relevance through a Linear layer, alpha = 1 and beta = 0, bias ignored (Chefer et al., 2021, eq. 5; the published code's Linear).

    Z = x+ W+^T + x- W-^T,   S = R / safe(Z),   R_in = x+ (S W+) + x- (S W-)

in absolute values, plain GEMMs without clamped copies: Z = (x W^T + |x| |W|^T) / 2, R_in = (x (S W) + |x| (S |W|)) / 2. With x W^T
known from the forward pass that is 3 n d_in d_out multiply-adds.

The two terms of Z cancel where nearly all contributions to an output are negative: the clamped sum has only positive terms and keeps
its digits, the difference loses them. Such outputs are taken out of the GEMMs and done in the clamped form.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyglobenc.reference.safe_division import safe_divide

# an output is nearly dead when Z is below this part of |x| |W|^T + |bias|; the digits lost above it are its logarithm
DEAD = {torch.float32: 2.0**-6, torch.float64: 2.0**-20}

# above this part of dead outputs, four clamped GEMMs are cheaper than single outputs
MOST_DEAD = 1 / 64

PAIR_FLOATS = 1 << 20


def linear_relevance(
    r: Tensor, x: Tensor, weight: Tensor, abs_weight: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """See `pyglobenc.ops.linear_relevance`: -> (B, n, d_in)."""
    weight = weight.to(x.dtype)
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
        if dead.sum() > MOST_DEAD * dead.numel():
            return clamped_relevance(r, x, weight)
    s = safe_divide(r, z)
    if dead is not None:
        s.masked_fill_(dead, 0)
    out = (s @ weight).mul_(x)
    out.addcmul_(s @ abs_weight, abs_x).mul_(0.5)
    if dead is not None:
        add_single_outputs(out, dead, r, x, weight)
    return out


def around_gemms(
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    abs_weight: Tensor | None,
    output: Tensor | None,
    bias: Tensor | None,
    quotient: Callable[..., tuple[Tensor, Tensor]],
    product: Callable[..., Tensor],
) -> Tensor:
    """The rule by a GPU's kernels: torch's GEMMs and what those kernels do around them.

    Args:
        r, x, weight, abs_weight, output, bias: as `pyglobenc.ops.linear_relevance` takes them.
        quotient: of r, y, |x| |W|^T (B, n, d_out), bias (d_out,) or None, and dead (B, n, d_out) bool or None: S (B, n, d_out), 0 at nearly
            dead outputs, and how many each block has of those (blocks,); marks them in dead.
        product: of x, S W and S |W|, (B, n, d_in) each: R_in (B, n, d_in).

    Returns:
        R_in (B, n, d_in).
    """
    if r.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    r, x, weight = r.contiguous(), x.contiguous(), weight.to(x.dtype)
    abs_weight = weight.abs() if abs_weight is None else abs_weight.to(x.dtype)
    bound = x.abs() @ abs_weight.T
    y = x @ weight.T if output is None else output.contiguous()
    bias = None if output is None or bias is None else bias.to(x.dtype).contiguous()
    s, counts = quotient(r, y, bound, bias, None)
    count, dead = total(counts), None
    if count:
        if count > MOST_DEAD * r.numel():
            return clamped_relevance(r, x, weight)
        dead = torch.empty_like(r, dtype=torch.bool)
        quotient(r, y, bound, bias, dead)
    out = product(x, s @ weight, s @ abs_weight)
    if dead is not None:
        add_single_outputs(out, dead, r, x, weight)
    return out


def total(counts: Tensor) -> int:
    """Sum of counts (blocks,), on the host."""
    return int(counts.sum())


def clamped_relevance(r: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The rule as published, with clamped copies: r (B, n, d_out), x (B, n, d_in), weight (d_out, d_in) -> (B, n, d_in)."""
    w_pos, w_neg, x_pos, x_neg = weight.clamp(min=0), weight.clamp(max=0), x.clamp(min=0), x.clamp(max=0)
    s = safe_divide(r, x_pos @ w_pos.T + x_neg @ w_neg.T)
    return x_pos * (s @ w_pos) + x_neg * (s @ w_neg)


def add_single_outputs(out: Tensor, dead: Tensor, r: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add the relevance of the outputs marked in `dead` (B, n, d_out) to out (B, n, d_in), each by the clamped sum."""
    flat_out, flat_x, flat_r = out.flatten(0, 1), x.flatten(0, 1), r.flatten(0, 1)
    index = dead.flatten(0, 1).nonzero()
    for rows, outputs in (chunk.unbind(1) for chunk in index.split(max(1, PAIR_FLOATS // x.shape[-1]))):
        parts = (flat_x[rows] * weight[outputs]).clamp_(min=0)
        s = safe_divide(flat_r[rows, outputs], parts.sum(-1))
        flat_out.index_add_(0, rows, parts.mul_(s[:, None]))

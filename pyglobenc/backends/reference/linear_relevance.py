"""Relevance through a Linear layer, alpha = 1 and beta = 0, bias ignored (Chefer et al., 2021, eq. 5; the published code's Linear).

    Z = x+ W+^T + x- W-^T,   S = R / safe(Z),   R_in = x+ (S W+) + x- (S W-)

in absolute values, plain GEMMs without clamped copies: Z = (x W^T + |x| |W|^T) / 2, R_in = (x (S W) + |x| (S |W|)) / 2. With x W^T
known from the forward pass that is 3 n d_in d_out multiply-adds.

The two terms of Z cancel where nearly all contributions to an output are negative: the clamped sum has only positive terms and keeps
its digits, the difference loses them. Such outputs are taken out of the GEMMs and done in the clamped form; all are, for four GEMMs,
where many are nearly dead or where their number must not be read, as while a CUDA graph is recorded.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyglobenc.backends.shared.safe_division import safe_divide
from pyglobenc.common.deferred import may_look

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
    strip: int,
    quotient: Callable[..., None],
    product: Callable[..., None],
) -> Tensor:
    """The rule by a GPU's kernels: torch's GEMMs and what those kernels do around them, nearly dead outputs included; reads no value.

    Args:
        r, x, weight, abs_weight, output, bias: as `pyglobenc.ops.linear_relevance` takes them.
        strip: how many outputs of a token share a flag.
        quotient: called with (x, weight, bound, flags) and (r, y, bias, s): bound = |x| |W|^T, y = x W^T + bias and s (B, n, d_out), bias
            (d_out,) or None, flags (B n, strips) int32. Fills s with S, 0 at nearly dead outputs, and the flags, not 0 where a strip has
            some; there bound becomes R / safe(Z) of these outputs, Z their clamped sum, 0 at the others.
        product: called with the same (x, weight, bound, flags) and (S W, S |W|), (B, n, d_in) each: S W becomes R_in.

    Returns:
        R_in (B, n, d_in).
    """
    if r.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    (batch, n, d_out), r, x, weight = r.shape, r.contiguous(), x.contiguous(), _cast(weight, x.dtype)
    abs_weight = weight.abs() if abs_weight is None else _cast(abs_weight, x.dtype)
    bound = linear(x.abs(), abs_weight)
    y = linear(x, weight) if output is None else output.contiguous()
    bias = None if output is None or bias is None else _cast(bias, x.dtype).contiguous()
    s, flags = torch.empty_like(r), torch.empty(batch * n, -(-d_out // strip), dtype=torch.int32, device=r.device)
    common = (x, weight, bound, flags)
    quotient(common, (r, y, bias, s))
    out = s @ weight
    product(common, (out, s @ abs_weight))
    return out


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    # a call of `to` that changes nothing takes four times as long
    return t if t.dtype == dtype else t.to(dtype)


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

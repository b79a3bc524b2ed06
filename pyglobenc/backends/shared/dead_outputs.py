"""Relevance through a Linear layer: the steps around the GEMMs, and the outputs that need the clamped form.

Z = (x W^T + |x| |W|^T) / 2 loses its digits where nearly all contributions to an output are negative. Such an
output is called nearly dead here, and its sum is computed from its positive terms alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyglobenc.backends.shared.safe_division import safe_divide

# An output is nearly dead if Z is below this fraction of |x| |W|^T + |bias|. Above it, at most log2(1 /
# fraction) bits are lost.
DEAD = {torch.float32: 2.0**-6, torch.float64: 2.0**-20}

# If more than this fraction of the outputs are nearly dead, four clamped GEMMs cost less than computing them
# one by one.
MAX_DEAD = 1 / 64

PAIR_FLOATS = 1 << 20


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
    """Apply the Linear rule with a GPU's kernels around torch's GEMMs; no tensor value is read on the host.

    Args:
        r, x, weight, abs_weight, output, bias: as `pyglobenc.ops.linear_relevance` takes them.
        strip: number of a token's outputs that share a flag.
        quotient: called with (x, weight, bound, flags) and (r, y, bias, s). Here bound = |x| |W|^T,
            y = x W^T + bias and s are (B, n, d_out), bias is (d_out,) or None, and flags is (B n, strips)
            int32. It fills s with S, and with 0 at nearly dead outputs. It sets the flag of each strip that
            holds such outputs. In these strips it overwrites bound with R / safe(Z) at nearly dead outputs, Z
            being the clamped sum, and with 0 at the others.
        product: called with the same (x, weight, bound, flags) and with (S W, S |W|), (B, n, d_in) each. It
            turns S W into R_in.

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
    s, flags = (
        torch.empty_like(r),
        torch.empty(batch * n, -(-d_out // strip), dtype=torch.int32, device=r.device),
    )
    common = (x, weight, bound, flags)
    quotient(common, (r, y, bias, s))
    out = s @ weight
    product(common, (out, s @ abs_weight))
    return out


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    # Calling `to` without need takes four times as long as this comparison.
    return t if t.dtype == dtype else t.to(dtype)


def clamped_relevance(r: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Apply the rule as published, with clamped copies.

    r (B, n, d_out), x (B, n, d_in), weight (d_out, d_in) -> (B, n, d_in).
    """
    w_pos, w_neg, x_pos, x_neg = weight.clamp(min=0), weight.clamp(max=0), x.clamp(min=0), x.clamp(max=0)
    s = safe_divide(r, x_pos @ w_pos.T + x_neg @ w_neg.T)
    return x_pos * (s @ w_pos) + x_neg * (s @ w_neg)


def add_single_outputs(out: Tensor, dead: Tensor, r: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add the relevance of the outputs marked in dead (B, n, d_out) to out (B, n, d_in).

    Their sums are clamped. r is (B, n, d_out), x (B, n, d_in) and weight (d_out, d_in).
    """
    flat_out, flat_x, flat_r = out.flatten(0, 1), x.flatten(0, 1), r.flatten(0, 1)
    index = dead.flatten(0, 1).nonzero()
    for rows, outputs in (chunk.unbind(1) for chunk in index.split(max(1, PAIR_FLOATS // x.shape[-1]))):
        parts = (flat_x[rows] * weight[outputs]).clamp_(min=0)
        s = safe_divide(flat_r[rows, outputs], parts.sum(-1))
        flat_out.index_add_(0, rows, parts.mul_(s[:, None]))

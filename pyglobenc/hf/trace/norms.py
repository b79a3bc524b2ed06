"""Finds the weight, bias and eps of a norm, and computes its statistics.

The parts of torch's own norms are read from their parameters, and those of other norms from their outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.launch import HALF
from pyglobenc.hf.weights import parameter

# Probes have these two sizes: for large ones eps is negligible beside the variance, for small ones it is not.
LARGE, SMALL = 16.0, 2.0**-10


class NormParts(NamedTuple):
    """The parts of a layer norm of single tokens, weight * (z - mean) * rstd + bias."""

    weight: Tensor | None  # (d,); None: ones
    bias: Tensor | None  # (d,); None: zeros
    eps: float | Tensor  # a Tensor has shape ()


def is_stock(norm: nn.Module) -> bool:
    """Return whether a norm of hidden states (B, n, d) is torch's own LayerNorm, with readable parameters."""
    return type(norm) is nn.LayerNorm


def norm_parts(norm: nn.Module, d: int) -> NormParts:
    """Return the parts of a norm of hidden states (B, n, d), which is assumed to be a layer norm.

    A norm of another class (a norm with adapters, a fused norm, a user's own) is applied to four tokens. If
    the norm is a layer norm, their outputs determine weight, bias and eps. `pyglobenc.hf.trace.checks` tests
    this assumption on the tokens of every call.

    Returns:
        NormParts. Weight and bias have the dtype of the parameters, or at least float32 if they are computed.

    Raises:
        ValueError: the norm does not take single tokens of d features, or torch's own norm averages over more
            than the features.
    """
    if is_stock(norm):
        if tuple(norm.normalized_shape) != (d,):
            raise ValueError(
                f"it normalises over {tuple(norm.normalized_shape)}, not over the {d} features of single "
                "tokens"
            )
        return NormParts(parameter(norm, "weight"), parameter(norm, "bias"), norm.eps)
    try:
        return _probed(norm, d)
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"it can't be applied to single tokens of {d} features ({error})") from error


@torch.no_grad()
def _probed(norm: nn.Module, d: int) -> NormParts:
    """Compute the parts of a layer norm from its outputs for four probes.

    The probes are a pattern of mean 0 and its negative, each in a large and a small size.
    """
    like = next((p for p in norm.parameters() if p.is_floating_point()), torch.empty(()))
    pattern = torch.ones(d, device=like.device)
    pattern[1::2] = -1
    if d % 2:
        pattern[:3] = torch.tensor([1.0, 1.0, -2.0], device=like.device)
    rows = torch.stack([scale * sign * pattern for scale in (LARGE, SMALL) for sign in (1, -1)])
    # Only `forward` is called, because hooks on the module are meant for the tokens of a text.
    out = norm.forward(rows[None].to(like.dtype))[0]
    out = out.float() if out.dtype in HALF else out
    pattern, variance = pattern.to(out.dtype), pattern.to(out.dtype).square().mean()
    large, small = (out[0] - out[1]) / 2, (out[2] - out[3]) / 2
    # eps solves small / large = SMALL / LARGE * sqrt((LARGE^2 variance + eps) / (SMALL^2 variance + eps)).
    q = ((small * large).sum() / large.square().sum() * (LARGE / SMALL)).square()
    eps = (variance * (LARGE**2 - q * SMALL**2) / (q - 1)).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    weight = large / (LARGE * pattern) * (LARGE**2 * variance + eps).sqrt()
    return NormParts(weight, (out[0] + out[1]) / 2, eps)


def layer_norm_stats(z: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and rstd of a layer norm of z (B, n, d), (B, n, 1) each, in float32 or float64."""
    z = z.detach()
    if z.dtype in HALF and z.device.type == "cpu" and not isinstance(eps, Tensor):
        # With parameters in float32 the kernel converts z as it reads it, and returns float32.
        weight = torch.ones(z.shape[-1])
        return torch.native_layer_norm(z, weight.shape, weight, torch.zeros_like(weight), eps)[1:]
    z = z.float() if z.dtype in HALF else z
    if isinstance(eps, Tensor):
        variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
        return mean, (variance + eps.to(z.dtype)).rsqrt()
    # On a CPU this is twenty times as fast as var_mean.
    return torch.native_layer_norm(z, z.shape[-1:], None, None, eps)[1:]


def rms_stats(z: Tensor, norm: nn.Module) -> Tensor:
    """Return rstd (B, n, 1) of an RMSNorm of z (B, n, d), in float32 or float64."""
    z = z.detach().float() if z.dtype in HALF else z.detach()
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return (z.square().mean(-1, keepdim=True) + eps).rsqrt()

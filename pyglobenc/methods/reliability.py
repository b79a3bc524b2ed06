"""How far rounding moves a result.

Relevance is divided by sums of both signs: a residual sum, the attention output, a score. Where such a sum is small beside its terms,
its rounding error, and that of the whole forward pass before it, is amplified. Two ways to say how much, both of the relative L2 error
of the scores without the pooled token's own entry, which the published code overwrites:

measured: once more from a first layer's input moved by about one rounding unit, and compared. Both run as one batch: a short input, bound
by the time that Python takes, costs little more, a long one twice as much.

estimated: carried along the pass itself, see `forward_error` and `relevance_error`.
"""

import torch
from torch import Tensor

from pyglobenc.reference.packing import position_of, sequence_sums

METHODS = ("auto", "measured", "estimated", "off")

# "auto" measures where that costs little, by a forward pass's multiply-adds: on two cores at most half of the attribution's time again, on
# a GPU as long as its kernels are done before the host has launched the next ones
MEASURED_BELOW = {"cpu": 1 << 29, "cuda": 1 << 36}

# above this relative error a warning is given
DIGITS_GONE = 1e-2

TINY = 1e-300


def measured(work: int, device: torch.device) -> bool:
    """Whether "auto" measures an input of `work` multiply-adds a forward pass; tensors on torch's meta device stand for a CPU's."""
    return work < MEASURED_BELOW.get(device.type, MEASURED_BELOW["cpu"])


class PrecisionWarning(UserWarning):
    """The digits of a result are lost to rounding."""


def squared_norm(t: Tensor) -> Tensor:
    """Sum of squares of every example, (B,), float64."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1).double().square()


def nudge(x: Tensor, offsets: Tensor | None = None) -> Tensor:
    """x (B, n, d) moved by about its rounding unit, by the same pattern every time, so that an example alone moves as in a batch, and a
    sequence alone as packed among others, (1, N, d)."""
    token = torch.arange(x.shape[1], device=x.device) if offsets is None else position_of(offsets, x.device)
    token = token.double()[:, None]
    feature = torch.arange(x.shape[2], device=x.device, dtype=torch.float64)
    # sines of integers: zero mean, no period
    pattern = torch.sin(token * 977 + feature + 1) * 2**0.5
    return (x.double() * (1 + pattern * torch.finfo(x.dtype).eps)).to(x.dtype)


def distance(moved: Tensor, scores: Tensor, own: Tensor | None, offsets: Tensor | None = None) -> Tensor:
    """Relative L2 distance (B,) of two results (B, ...), of packed sequences (1, N) that of each, (S,); own (B, 1) or (1, S): indices of
    pooled tokens, whose entries are left out."""
    difference, size = moved - scores, scores
    if own is not None:
        difference, size = (t.scatter(1, own, 0) for t in (difference, size))
    if offsets is not None:
        difference, size = (sequence_sums(t.double().square(), offsets) for t in (difference, size))
    else:
        difference, size = squared_norm(difference), squared_norm(size)
    return (difference / size.clamp_min(TINY)).sqrt()

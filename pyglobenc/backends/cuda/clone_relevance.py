"""Launcher of csrc/cuda/clone_relevance.cu."""

from collections.abc import Sequence

from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._relevance import float32_reasons, new_like

MAX_PARTS = 4


def why_not(parts: Sequence[Tensor], x: Tensor) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.clone_relevance` can't run here; empty if they can."""
    reasons = float32_reasons(x=x, **{f"parts[{index}]": part for index, part in enumerate(parts)})
    if len(parts) > MAX_PARTS:
        reasons.append(f"takes up to {MAX_PARTS} parts, got {len(parts)}")
    return reasons


def run(parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """See `pyglobenc.ops.clone_relevance`: -> (B, n, d)."""
    out = new_like(x)
    if x.numel():
        given = [part.contiguous() for part in parts]
        with _extension.launching(x.device) as stream:
            _extension.kernels.clone_relevance(given, x.contiguous(), out, stream)
    return out

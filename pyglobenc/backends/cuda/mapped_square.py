"""Launcher of csrc/cuda/mapped_square.cu."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._pairs import in_pieces
from pyglobenc.backends.cuda._relevance import float32_reasons


def why_not(x: Tensor, gammas: Sequence[Tensor]) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.mapped_square` can't run here; empty if they can."""
    return float32_reasons({"x": x}, **{f"gammas[{index}]": gamma for index, gamma in enumerate(gammas)})


def run(x: Tensor, gammas: Sequence[Tensor]) -> Tensor:
    """See `pyglobenc.ops.mapped_square`: -> (B, n)."""
    out = torch.empty(x.shape[:2], device=x.device)
    if out.numel() == 0 or x.shape[2] == 0:
        return out.zero_()
    with _extension.launching(x.device) as stream:
        _extension.kernels.mapped_square(
            in_pieces(x), [in_pieces(gamma) for gamma in gammas], x.shape[2], out, stream
        )
    return out

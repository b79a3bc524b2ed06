"""The compiled module, or an ImportError that says why it isn't there."""

import torch
from torch import Tensor

try:
    from pyglobenc import _cpu as kernels
except ImportError as error:
    raise ImportError(f"the compiled module pyglobenc._cpu doesn't load ({error}); reinstall with a C++17 compiler on PATH") from error

__all__ = ["kernels", "limits", "single"]

INPUTS = (torch.float32, torch.float16, torch.bfloat16)


def limits(arithmetic: Tensor, *inputs: Tensor) -> list[str]:
    """Why the kernels can't run: arithmetic is a tensor in the dtype of the result, inputs are those widened on load."""
    reasons = []
    devices = {t.device.type for t in (arithmetic, *inputs)}
    if devices != {"cpu"}:
        reasons.append(f"tensors must be on the CPU, got {', '.join(sorted(devices))}")
    if arithmetic.dtype != torch.float32:
        reasons.append(f"computes in float32, got {arithmetic.dtype}")
    dtypes = {t.dtype for t in inputs} - set(INPUTS)
    if dtypes:
        reasons.append(f"inputs must be float32, float16 or bfloat16, got {', '.join(map(str, dtypes))}")
    return reasons


def single(*tensors: Tensor) -> list[str]:
    """Why the kernels that take nothing but float32 can't run on these tensors."""
    reasons = limits(tensors[0], *tensors[1:])
    dtypes = {t.dtype for t in tensors} - {torch.float32}
    return reasons or [f"computes in float32, got {dtype}" for dtype in dtypes]

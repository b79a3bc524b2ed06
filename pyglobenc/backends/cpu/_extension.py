"""The compiled module of CPU kernels; importing this raises ImportError with the reason if it is missing."""

import torch
from torch import Tensor

from pyglobenc.backends.inputs import PairInputs, RelevanceInputs

try:
    from pyglobenc import _cpu as kernels
except ImportError as error:
    raise ImportError(
        f"the compiled module pyglobenc._cpu doesn't load ({error}); reinstall with a C++17 compiler on PATH"
    ) from error

__all__ = ["kernels", "limits", "pair_limits", "relevance_limits", "single"]

INPUTS = (torch.float32, torch.float16, torch.bfloat16)


def limits(arithmetic: Tensor, *inputs: Tensor) -> list[str]:
    """Return the reasons why the kernels can't run on these tensors, which may have any shape.

    Args:
        arithmetic: a tensor with the dtype of the result, which must be float32.
        inputs: tensors in float32, float16 or bfloat16, which the kernels convert when they load them.
    """
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


def pair_limits(inputs: PairInputs) -> list[str]:
    """Return why the kernels over (query, key) pairs can't run."""
    reasons = limits(inputs.gram, inputs.q, inputs.k)
    return reasons + inputs.reference_alone()


def relevance_limits(inputs: RelevanceInputs, *others: Tensor | None) -> list[str]:
    """Return why the kernels of relevance through attention can't run; others: further tensors of the op."""
    given = inputs.of_tokens().values()
    reasons = single(*given, *(t for t in others if t is not None))
    return reasons + inputs.reference_alone()


def single(*tensors: Tensor) -> list[str]:
    """Return why the kernels that accept only float32 can't run on these tensors."""
    reasons = limits(tensors[0], *tensors[1:])
    dtypes = {t.dtype for t in tensors} - {torch.float32}
    return reasons or [f"computes in float32, got {dtype}" for dtype in dtypes]

"""Half precision, and what kernels of float32 say to other dtypes."""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def float32_reasons(widened: dict[str, Tensor | None], tensors: dict[str, Tensor | None]) -> list[str]:
    """Why a float32 kernel can't take these tensors; those that it widens may be in half precision, any may be of another kind or None."""
    given = {**widened, **tensors}
    others = {name: t for name, t in given.items() if t is not None and t.dtype != torch.float32 and t.is_floating_point()}
    wrong = [f"{name} {t.dtype}" for name, t in others.items() if t.dtype not in HALF or name in tensors]
    return ["computes in float32, got " + ", ".join(wrong)] if wrong else []

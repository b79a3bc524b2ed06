"""Reads indices that a user gives as an integer, a list, an array or a tensor."""

from typing import Any

import torch
from torch import Tensor


def integers(who: str, name: str, value: Any, device: torch.device | str | None = None) -> Tensor:
    """Return a user's indices as a tensor of integers.

    Args:
        who, name: names of the method and of the argument for errors.
        value: an integer, or integers in a tensor, an array or nested sequences of any shape.
        device: the device of the result. None means that of a tensor, and the default device for others.

    Returns:
        The indices in the shape of value. Without any index the dtype may be another one.

    Raises:
        TypeError: value doesn't hold integers, or one of them has more than 64 bits.
    """
    try:
        index = torch.as_tensor(value, device=device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{who}: {name} must be integers, got {value!r:.80} ({error})") from error
    if index.numel() and (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
        raise TypeError(f"{who}: {name} must be integers, got {index.dtype}")
    return index

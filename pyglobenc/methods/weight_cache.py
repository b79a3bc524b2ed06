"""What the relevance rules and their error read of a model's weights beside the weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WeightCache:
    """Squared row norms and other small things of modules' weights. It lives for one call, since the weights may change after it."""

    def __init__(self):
        self._kept: dict[tuple, Tensor] = {}
        self._absolute: Tensor | None = None
        self._numbers: dict[tuple, Tensor] = {}

    def absolute(self, module: nn.Linear, dtype: torch.dtype) -> Tensor | None:
        """|W| (d_out, d_in), until the next call of this; None where it would have to be widened.

        One module's at a time is in one piece of memory: new memory for each took 8 % of a call of BERT-base at 128 tokens.
        """
        weight, memory = module.weight.detach(), self._absolute
        if weight.dtype != dtype:
            return None
        if memory is None or memory.numel() < weight.numel() or memory.device != weight.device or memory.dtype != dtype:
            memory = self._absolute = weight.new_empty(weight.numel())
        return torch.abs(weight, out=memory[: weight.numel()].view(weight.shape))

    def row_norms(self, module: nn.Linear, dtype: torch.dtype) -> Tensor:
        """Sum of squares of every row of W, (d_out,)."""
        return self._keep(module, "row_norms", dtype, lambda w: torch.linalg.vector_norm(w, dim=1).square_().to(dtype))

    def mean_row_norm(self, module: nn.Linear, dtype: torch.dtype) -> Tensor:
        """Their mean, ()."""
        return self._keep(module, "mean_row_norm", dtype, lambda _: self.row_norms(module, dtype).mean())

    def number(self, value: float, like: Tensor) -> Tensor:
        """A constant of a tensor's dtype and device, ()."""
        key = (value, like.dtype, like.device)
        if key not in self._numbers:
            self._numbers[key] = like.new_full((), value)
        return self._numbers[key]

    def _keep(self, module: nn.Module, name: str, dtype: torch.dtype, make: Callable[[Tensor], Tensor]) -> Tensor:
        key = (module, name, dtype)
        if key not in self._kept:
            self._kept[key] = make(module.weight.detach())
        return self._kept[key]

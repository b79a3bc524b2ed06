"""What the relevance rules and their error read of a model's weights beside the weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WeightCache:
    """|W|, squared row norms and other small things of modules' weights, kept until the weights change."""

    def __init__(self):
        self._kept: dict[tuple, tuple[tuple, Tensor]] = {}
        self._numbers: dict[tuple, Tensor] = {}

    def absolute(self, module: nn.Linear, dtype: torch.dtype) -> Tensor | None:
        """|W| (d_out, d_in), or None where it would have to be widened."""
        return self._keep(module, "absolute", dtype, torch.abs) if module.weight.dtype == dtype else None

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
        weight = module.weight.detach()
        key, version = (module, name, dtype), (weight.data_ptr(), weight._version)
        if self._kept.get(key, (None,))[0] != version:
            self._kept[key] = (version, make(weight))
        return self._kept[key][1]

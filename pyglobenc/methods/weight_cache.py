"""What the relevance rules and their error read of a model's weights beside the weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WeightCache:
    """|W| and the squared row norms of Linear modules, kept until the weights change."""

    def __init__(self):
        self._kept: dict[tuple[nn.Module, str], tuple[tuple, Tensor]] = {}

    def absolute(self, module: nn.Linear, dtype: torch.dtype) -> Tensor | None:
        """|W| (d_out, d_in), or None where it would have to be widened."""
        return self._keep(module, "absolute", torch.abs) if module.weight.dtype == dtype else None

    def row_norms(self, module: nn.Linear, dtype: torch.dtype) -> Tensor:
        """Sum of squares of every row of W, (d_out,)."""
        return self._keep(module, "row_norms", lambda w: torch.linalg.vector_norm(w, dim=1).square_()).to(dtype)

    def _keep(self, module: nn.Linear, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        weight = module.weight.detach()
        version = (weight.data_ptr(), weight._version)
        if self._kept.get((module, name), (None,))[0] != version:
            self._kept[module, name] = (version, make(weight))
        return self._kept[module, name][1]

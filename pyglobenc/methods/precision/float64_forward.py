"""Run a model's forward pass in float64 without a float64 copy of the model.

Parameters are cast one at a time, when a function of torch.nn.functional reads them. The autograd graph
keeps the weights in their own dtype and casts them again for the gradient. So memory holds only one
float64 weight at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WideLinear(torch.autograd.Function):
    """x W^T + b in the dtype of x, differentiable with respect to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class WideParameters(TorchFunctionMode):
    """Context in which linear, layer_norm, embedding and conv2d compute in `dtype`.

    The parameters keep their own dtype.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return WideLinear.apply(*_linear_args(self.dtype, *args, **kwargs))
        if func is F.embedding:
            return func(*args, **kwargs).to(self.dtype)
        if func in (F.layer_norm, F.conv2d):
            args = tuple(self._widen(a) for a in args)
            kwargs = {name: self._widen(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _widen(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) else value


def _linear_args(
    dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input.to(dtype), weight, bias

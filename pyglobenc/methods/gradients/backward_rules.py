"""The backward rules of AttnLRP, CP-LRP, GIM and LibraGrad: a method is one row of `RULES`.

A method runs the stock model, changes what some operations do in the backward pass, and multiplies the first
layer's input by the gradient that arrives there. A linear operation keeps its gradient: input times gradient
is then the epsilon rule of layer-wise relevance propagation with epsilon 0 (AttnLRP, eq. 8). All rows treat a
normalisation as linear: its statistics are constants (Ali et al., eq. 9; AttnLRP, proposition 3.4).

Sources: Achtibat et al., ICML 2024, "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for
Transformers"; Ali et al., ICML 2022, "XAI for Transformers: Better Explanations through Conservative
Propagation"; Edin et al., 2025, "GIM: Improved Interpretability for Large Language Models"; Mehri et al.,
CVPR 2025, "LibraGrad: Balancing Gradient Flow for Universally Better Vision Transformer Attributions".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyglobenc.hf.trace.norms import layer_norm_stats

# Products of fewer rows take less time than it takes to find the rows without a gradient.
FEW = 64


@dataclass(frozen=True)
class BackwardRules:
    """One method: what the backward pass does with each kind of operation that is not linear.

    Attributes:
        summary: one line, with the paper.
        secants: an activation f gets the slope f(z) / z of its secant through the origin, so that it passes
            its relevance on (AttnLRP, eq. 9). False keeps the derivative of f.
        halves: the factors of a product that both depend on the input get half of the gradient each (AttnLRP,
            eq. 7). False makes the gate, which is the activation's output in a gated product, a constant.
        probabilities: attention probabilities get a gradient, the softmax's own one. Times the scores it is
            AttnLRP's rule of the softmax (proposition 3.1). False makes them constants.
        temperature: the gradient of a softmax is taken at the scores divided by this number.
    """

    summary: str
    secants: bool = True
    halves: bool = True
    probabilities: bool = True
    temperature: float = 1.0


RULES = {
    "attnlrp": BackwardRules(
        "relevance with AttnLRP's rules for softmax, products, activations and norms; signed (Achtibat et "
        "al., 2024)",
    ),
    "cp-lrp": BackwardRules(
        "relevance with constant attention probabilities, gates and statistics of norms; signed (Ali et al., "
        "2022)",
        halves=False,
        probabilities=False,
    ),
    "gim": BackwardRules(
        "gradient x input with the softmax's gradient at temperature 2, divided gradients of products and "
        "constant statistics of norms; signed (Edin et al., 2025)",
        secants=False,
        temperature=2.0,
    ),
    "libragrad": BackwardRules(
        "gradient x input with constant attention probabilities and statistics of norms, secants of "
        "activations and halved products; signed (Mehri et al., 2025)",
        probabilities=False,
    ),
}


class Scaled(Function):
    """The input x unchanged; its gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Secant(Function):
    """f(x) of an elementwise function with f(0) = 0, whose derivative becomes f(x) / x, and 0 at x = 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        y = f(x)
        ctx.save_for_backward((y / x).nan_to_num_(0.0))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


class Product(Function):
    """a * b, whose factors get half of the gradient each."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = grad * 0.5
        return (grad * b).sum_to_size(a.shape).to(a.dtype), (grad * a).sum_to_size(b.shape).to(b.dtype)


class Norm(Function):
    """A layer norm or RMSNorm over the last dimension, whose statistics are constants.

    `compute` returns the norm's output, the reciprocal deviation (..., 1) and whether the norm subtracts the
    mean. Subtracting the mean is linear and keeps its gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, compute: Callable[[], tuple]) -> Tensor:
        y, rstd, ctx.centred = compute()
        ctx.dtype = x.dtype
        ctx.save_for_backward(rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rstd, weight = ctx.saved_tensors
        grad = grad.to(torch.promote_types(grad.dtype, rstd.dtype))
        grad = grad.clone() if weight is None else grad * weight
        if ctx.centred:
            grad -= grad.mean(-1, keepdim=True)
        return grad.mul_(rstd).to(ctx.dtype), None, None


class Linear(Function):
    """A linear layer x W^T + bias, or x W + bias, differentiable with respect to x (..., inputs) only.

    The backward pass skips rows whose gradient is 0: all tokens but the one that the head reads, in the head
    and in the last layer's MLP.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, compute: Callable[[], Tensor], transposed: bool
    ) -> Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(weight)
        return compute()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        weight = weight.T if ctx.transposed else weight
        flat = grad.reshape(-1, grad.shape[-1])
        if len(flat) < FEW:
            return grad @ weight, None, None, None
        # A minimum and a maximum of 0 take a tenth of the time of `any`.
        rows = (flat.amin(1).ne(0) | flat.amax(1).ne(0)).nonzero()[:, 0]
        if 2 * len(rows) > len(flat):
            return grad @ weight, None, None, None
        out = grad.new_zeros(len(flat), weight.shape[1]).index_copy_(0, rows, flat[rows] @ weight)
        return out.view(*grad.shape[:-1], -1), None, None, None


class TemperedSoftmax(Function):
    """softmax(x), whose gradient is that of softmax(x / temperature) times the temperature (GIM)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None, temperature: float) -> Tensor:
        ctx.dim, ctx.dtype, ctx.temperature = dim, dtype, temperature
        ctx.save_for_backward(x)
        return torch.softmax(x, dim, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        p = torch.softmax(x / ctx.temperature, ctx.dim, dtype=ctx.dtype)
        weighted = p * grad
        return (weighted - p * weighted.sum(ctx.dim, keepdim=True)).to(x.dtype), None, None, None


def layer_norm(
    func: Callable,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Apply `func`, which is a layer norm over the last dimension of x (..., d), as a `Norm`."""
    # torch's kernel returns the statistics too, unless dtypes differ or autocast changes them.
    plain = (
        x.dtype in (torch.float32, torch.float64)
        and all(p is None or p.dtype == x.dtype for p in (weight, bias))
        and not torch.is_autocast_enabled(x.device.type)
    )

    def compute() -> tuple[Tensor, Tensor, bool]:
        if plain:
            y, _, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
            return y, rstd, True
        return func(x, shape, weight, bias, eps), layer_norm_stats(x, eps)[1], True

    return Norm.apply(x, weight, compute)


def rms_norm(
    func: Callable, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Apply `func`, which is torch's RMSNorm over the last dimension of x (..., d), as a `Norm`."""

    def compute() -> tuple[Tensor, Tensor, bool]:
        z = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        added = torch.finfo(x.dtype).eps if eps is None else eps
        rstd = (z.square().mean(-1, keepdim=True) + added).rsqrt()
        return func(x, shape, weight, eps), rstd, False

    return Norm.apply(x, weight, compute)


def normalize(func: Callable, x: Tensor, p: float, dim: int, eps: float) -> Tensor:
    """Apply `func`, which is torch's normalize: x (any shape) divided by its p-norm, as a `Norm`."""

    def compute() -> tuple[Tensor, Tensor, bool]:
        size = torch.linalg.vector_norm(x, p, dim, keepdim=True).clamp_min(eps)
        return func(x, p, dim, eps), size.reciprocal(), False

    return Norm.apply(x, None, compute)

"""Runs a stock model so that its autograd graph follows the backward rules of one method.

The rules apply to operations, not to modules: each call of a torch function on tensors that depend on the
first layer's input is looked up in a table. So they hold for any module, known or not. Afterwards every node
of the graph must be linear or have a rule; another one is refused by name.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pyglobenc.hf import find_layers
from pyglobenc.hf.trace.capture import attention_configs
from pyglobenc.hf.trace.threads import attention_in_this_thread, in_this_thread, uncompiled
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.gradients import ruled_attention
from pyglobenc.methods.gradients.backward_rules import (
    RULES,
    Linear,
    Norm,
    Product,
    Scaled,
    Secant,
    TemperedSoftmax,
    layer_norm,
    normalize,
    rms_norm,
)
from pyglobenc.methods.gradients.graph import LINEAR, Graph, kind
from pyglobenc.methods.precision.float64_forward import WideLinear

OURS = {f._backward_cls for f in (Linear, Norm, Product, Scaled, Secant, TemperedSoftmax, WideLinear)}
# Elementwise functions of one tensor that are 0 at 0.
ACTIVATIONS = set(
    "celu elu gelu hardswish leaky_relu mish relu relu6 selu silu softsign tanh tanhshrink".split()
)
# transformers' own activations are modules, and several consist of operations that have no rule alone.
ACTIVATION_MODULES = "transformers.activations"
# The sizes of rounding that a check of an activation allows, in units of the dtype.
ROUNDINGS = 64


class ModifiedBackward(TorchFunctionMode):
    """One forward pass under the rules of one method, from the first layer's input to the logits.

    Args:
        who: name of the caller for errors.
        method: a name in RULES.
    """

    def __init__(self, who: str, method: str):
        super().__init__()
        self.who, self.method, self.rules = who, method, RULES[method]
        self._graph: Graph | None = None
        # How many activation modules are running, whose operations have no rules of their own.
        self._whole = 0
        # The classes of activation modules that were checked in this pass.
        self._activations: set[Any] = set()
        # The name of each operation without a rule, and of the module that computed it.
        self._named: dict[Any, str] = {}

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """Context in which `model` runs under the rules; the backward pass belongs inside it too."""
        stock, found = stock_model(model), find_layers(model)
        token = ruled_attention.TAPE.set(self)
        try:
            with ExitStack() as stack:
                stack.enter_context(uncompiled())
                if any(layer.own_scores is None for layer in found):
                    configs = attention_configs(stock, found)
                    stack.enter_context(attention_in_this_thread(configs, ruled_attention.NAME))
                for module in model.modules():
                    if type(module).__module__ == ACTIVATION_MODULES:
                        for handle in self._as_a_whole(module):
                            stack.callback(handle.remove)
                stack.enter_context(self)
                yield
        finally:
            ruled_attention.TAPE.reset(token)
            self._graph, self._named = None, {}

    def start(self, x: Tensor) -> None:
        """Note the first layer's input (B, n, d), which the gradient is computed for."""
        self._graph = Graph(x)

    def trust(self, output: Tensor, inputs: Iterable[Tensor]) -> None:
        """Note that the rules hold between tensors of any shapes, whatever the graph between them is."""
        self._graph.trust(output, inputs)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self._graph is None or self._whole or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        rule = FUNCTIONS.get(name)
        out = func(*args, **kwargs) if rule is None else rule(self, func, *args, **kwargs)
        if name not in HARMLESS and isinstance(out, Tensor) and out.grad_fn is not None:
            if kind(out.grad_fn) in LINEAR:
                HARMLESS.add(name)
            elif type(out.grad_fn) not in OURS:
                self._named[out.grad_fn] = f"{name} in {_caller()}"
        return out

    def check(self, logit: Tensor) -> None:
        """Check that the graph from the logits (any shape) to the first layer's input follows the rules.

        Raises:
            ValueError: an operation is neither linear nor covered by a rule. It is named.
        """
        node = self._graph.without_rule(logit, self._has_rule)
        if node is not None:
            raise ValueError(
                f"{self.who}: {self.method} has no rule for an operation of this model, "
                f"{self._named.get(node) or node.name()}: it is neither linear nor a known activation, norm, "
                "product or attention"
            )

    def _has_rule(self, node: Any) -> bool:
        own = self.rules.probabilities and self.rules.temperature == 1
        return type(node) in OURS or (own and kind(node) == "Softmax")

    def _depends(self, *tensors: Any) -> bool:
        return all(self._graph.depends(t) for t in tensors)

    def _activation(self, func: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._depends(x) or kwargs.get("inplace") or any(a is True for a in args):
            return func(x, *args, **kwargs)
        if self.rules.secants:
            return Secant.apply(x, lambda t: func(t, *args, **kwargs))
        y = func(x, *args, **kwargs)
        self._graph.trust(y, (x,))
        return y

    def _as_a_whole(self, module: nn.Module) -> Iterator[RemovableHandle]:
        """Register hooks that apply an activation's rule to a module, not to its operations."""
        given: list[Tensor | None] = []

        def before(module: nn.Module, args: tuple) -> tuple | None:
            on = self._graph is not None and torch.is_grad_enabled()
            ruled = on and len(args) == 1 and self._depends(*args)
            given.append(args[0] if ruled else None)
            self._whole += ruled
            return (args[0].detach(),) if ruled and self.rules.secants else None

        def after(module: nn.Module, args: tuple, y: Tensor | None) -> Tensor | None:
            x = given.pop()
            self._whole -= x is not None
            # A checkpoint stops the second forward pass early, with an exception; then there is no output.
            if x is None or y is None:
                return None
            with torch._C.DisableTorchFunction():
                if not self._checked(module) and not _is_activation(module.forward, x.detach(), y.detach()):
                    raise ValueError(
                        f"{self.who}: {self.method} has no rule for {type(module).__name__}, which isn't an "
                        "elementwise function that is 0 at 0"
                    )
                return self._activation(lambda _: y, x)

        yield module.register_forward_pre_hook(in_this_thread(before))
        yield module.register_forward_hook(in_this_thread(after), prepend=True, always_call=True)

    def _checked(self, module: nn.Module) -> bool:
        """Tell whether another activation of this class was checked in this pass, and note this one."""
        kind_of = type(module) if "forward" not in vars(module) else module
        seen = kind_of in self._activations
        self._activations.add(kind_of)
        return seen

    def _product(self, func: Callable, a: Any, b: Any, **kwargs: Any) -> Any:
        if kwargs or not self._depends(a, b):
            return func(a, b, **kwargs)
        if self.rules.halves:
            return Product.apply(a, b)
        gates = [type(t.grad_fn) is Secant._backward_cls for t in (a, b)]
        if gates == [True, False]:
            a = a.detach()
        elif gates == [False, True]:
            b = b.detach()
        return func(a, b, **kwargs)

    def _linear(self, func: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._is_linear(x, weight, bias):
            return func(x, weight, bias)
        return Linear.apply(x, weight, lambda: func(x, weight, bias), False)

    def _addmm(self, func: Callable, bias: Tensor, x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
        if kwargs or not self._is_linear(x, weight, bias):
            return func(bias, x, weight, **kwargs)
        return Linear.apply(x, weight, lambda: func(bias, x, weight), True)

    def _is_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Tell whether a product is that of tokens with constant weights, all of one dtype."""
        return (
            self._depends(x)
            and not (self._depends(weight) or self._depends(bias))
            and weight.dtype == x.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _matmul(self, func: Callable, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        if not (self.rules.halves and self._depends(a, b)):
            return func(a, b, **kwargs)
        inputs = a, b = Scaled.apply(a, 0.5), Scaled.apply(b, 0.5)
        out = func(a, b, **kwargs)
        self._graph.trust(out, inputs)
        return out

    def _quotient(self, func: Callable, a: Any, b: Any, **kwargs: Any) -> Any:
        # Tokens divided by one number each are a normalisation (AttnLRP, proposition 3.4).
        norm = self._depends(a, b) and b.shape[-1:] == (1,)
        return func(a, b.detach() if norm else b, **kwargs)

    def _root(self, func: Callable, x: Tensor, **kwargs: Any) -> Tensor:
        out = func(x, **kwargs)
        return out.detach() if self._depends(x) and self._graph.is_mean_square(x.grad_fn) else out

    def _softmax(
        self, func: Callable, x: Tensor, dim: int | None = None, *args: Any, dtype: Any = None, **kwargs: Any
    ) -> Tensor:
        if not self._depends(x) or dim is None or args:
            return func(x, dim, *args, dtype=dtype, **kwargs)
        if not self.rules.probabilities:
            return func(x.detach(), dim, dtype=dtype, **kwargs)
        if self.rules.temperature != 1:
            return TemperedSoftmax.apply(x, dim, dtype, self.rules.temperature)
        return func(x, dim, dtype=dtype, **kwargs)

    def _layer_norm(
        self, func: Callable, x: Tensor, shape: Any, *args: Any, cudnn_enable: bool = True, **kwargs: Any
    ) -> Tensor:
        known = self._depends(x) and len(shape) == 1
        return layer_norm(func, x, shape, *args, **kwargs) if known else func(x, shape, *args, **kwargs)

    def _rms_norm(self, func: Callable, x: Tensor, shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        known = self._depends(x) and len(shape) == 1
        return rms_norm(func, x, shape, *args, **kwargs) if known else func(x, shape, *args, **kwargs)

    def _normalize(
        self, func: Callable, x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None
    ) -> Tensor:
        return normalize(func, x, p, dim, eps) if self._depends(x) else func(x, p, dim, eps, out)


# Maps the name of a torch function to the rule for it.
FUNCTIONS = {name: ModifiedBackward._activation for name in ACTIVATIONS} | {
    "addmm": ModifiedBackward._addmm,
    "bmm": ModifiedBackward._matmul,
    "div": ModifiedBackward._quotient,
    "div_": ModifiedBackward._quotient,
    "layer_norm": ModifiedBackward._layer_norm,
    "linear": ModifiedBackward._linear,
    "matmul": ModifiedBackward._matmul,
    "mm": ModifiedBackward._matmul,
    "mul": ModifiedBackward._product,
    "normalize": ModifiedBackward._normalize,
    "rms_norm": ModifiedBackward._rms_norm,
    "rsqrt": ModifiedBackward._root,
    "softmax": ModifiedBackward._softmax,
    "sqrt": ModifiedBackward._root,
    "true_divide": ModifiedBackward._quotient,
}
# Names of torch functions whose nodes need not be named in errors. The set grows.
HARMLESS = {"__get__"}


def _caller() -> str:
    """Return the class of the module that called a torch function."""
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return type(owner).__name__
        frame = frame.f_back
    return "a function"


def _is_activation(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> bool:
    """Tell whether y = f(x) holds element by element, from a sample of x (any shape), and f(0) = 0."""
    if y.shape != x.shape:
        return False
    step = max(1, x.numel() // 8)
    x, y = x.flatten()[::step], y.flatten()[::step]
    again = f(torch.cat([x, torch.zeros_like(x[:1])]))
    allowed = ROUNDINGS * torch.finfo(y.dtype).eps * (x.abs() + y.abs())
    return not ((again[:-1] - y).abs() > allowed).any() and bool(again[-1] == 0)

"""Registers ops with torch, and calls them directly where torch's dispatcher would add nothing."""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pyglobenc.backends.inputs import Inputs

PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple}


def register(
    name: str, schema: str | None = None, inputs: type[Inputs] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers a function without side effects as the op pyglobenc::name.

    torch's dispatcher takes 25 us. A call with plain tensors, without tracing and without gradients, goes to
    the function directly. Any other call, such as one under torch.compile or on fake tensors, goes through
    the registered op. The function's tensors may have any shape.

    Args:
        name: name of the op.
        schema: the arguments after those of inputs, and the results, as torch.library writes them. None
            means that they are taken from the annotations.
        inputs: class of the function's first argument. The registered op takes its fields instead.

    Returns:
        The decorator. The decorated function has `register_fake`, as the ops of torch.library have.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if inputs is None:
            op = torch.library.custom_op(f"pyglobenc::{name}", function, mutates_args=(), schema=schema)
        else:
            whole = f"({inputs.schema()}, {schema}"
            op = torch.library.custom_op(
                f"pyglobenc::{name}", _unflat(function, inputs), mutates_args=(), schema=whole
            )

        @wraps(function)
        def call(first: Any, *others: Any) -> Any:
            flat = _flat((first, *others) if inputs is None else (*vars(first).values(), *others))
            _check_device(name, flat)
            watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
            # torch.library has no type for a score_mod.
            if getattr(first, "score_mod", None) is not None or (not watched and _plain(flat)):
                return function(first, *others)
            return op(*((first,) if inputs is None else first.flat()), *others)

        call.register_fake = lambda fake: op.register_fake(fake if inputs is None else _unflat(fake, inputs))
        return call

    return decorate


def _unflat(function: Callable[..., Any], inputs: type[Inputs]) -> Callable[..., Any]:
    """Return the function for flat arguments."""

    def call(*args: Any) -> Any:
        made, others = inputs.from_flat(args)
        return function(made, *others)

    return call


def _flat(args: Sequence[Any]) -> Sequence[Any]:
    """Return the arguments with the entries of lists in place of the lists."""
    if list not in map(type, args):
        return args
    return [*chain.from_iterable(arg if isinstance(arg, list) else (arg,) for arg in args)]


def _check_device(name: str, args: Sequence[Any]) -> None:
    """Raise ValueError unless all tensors are on one device. Only cu_seqlens, which is int32, stays on the
    CPU.
    """
    devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.dtype != torch.int32}
    if len(devices) > 1:
        raise ValueError(
            f"{name}: tensors must be on one device, got {' and '.join(sorted(map(str, devices)))}"
        )


def _plain(args: Sequence[Any]) -> bool:
    """Return whether all tensors are plain ones without gradient recording."""
    if not PLAIN.issuperset(map(type, args)):
        return False
    return not (
        torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    )

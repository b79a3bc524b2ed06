"""Registration of ops with torch, and the way past its dispatcher, which takes longer than the checks of an op's arguments."""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function that mutates nothing as the op pyglobenc::name; `register_fake` is the op's.

    A call goes straight to the function, 25 us sooner, where the dispatcher would add nothing: no tracing, no gradient to be refused,
    plain tensors. Elsewhere, so under torch.compile and on fake tensors, it is a call of the op.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"pyglobenc::{name}", function, mutates_args=())

        @wraps(function)
        def call(*args: Any) -> Any:
            watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
            return op(*args) if watched or not _plain(args) else function(*args)

        call.register_fake = op.register_fake
        return call

    return decorate


def _plain(args: Sequence[Any]) -> bool:
    """Whether no argument, or entry of one, is a tensor of a class of its own, or one whose gradient is being recorded."""
    if list in map(type, args):
        args = [*chain.from_iterable(arg if isinstance(arg, list) else (arg,) for arg in args)]
    if not PLAIN.issuperset(map(type, args)):
        return False
    return not (torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args))

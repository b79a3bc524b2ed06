"""Limits the caller's torch.autocast to the forward pass of the model.

Attribution computes in the dtypes of its own tensors. Under autocast, torch's matrix products return half
precision, and a kernel that expects float32 would misread them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

KINDS = ("cpu", "cuda")

_CALLERS: ContextVar[dict[str, torch.dtype] | None] = ContextVar("pyglobenc_callers_autocast", default=None)


def outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that the caller's autocast is off while it runs."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        active = {kind: torch.get_autocast_dtype(kind) for kind in KINDS if torch.is_autocast_enabled(kind)}
        if not active:
            return function(*args, **kwargs)
        token = _CALLERS.set(active)
        try:
            with ExitStack() as stack:
                for kind in active:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                return function(*args, **kwargs)
        finally:
            _CALLERS.reset(token)

    return call


@contextmanager
def callers_autocast() -> Iterator[None]:
    """Return a context that turns the caller's autocast on again, inside an `outside_autocast` function."""
    with ExitStack() as stack:
        for kind, dtype in (_CALLERS.get() or {}).items():
            stack.enter_context(torch.autocast(kind, dtype))
        yield


def cast_by_autocast(*tensors: Tensor) -> list[Tensor]:
    """Return tensors of any shapes, such as q, k and v (B, H, n, dh), as autocast casts them for attention.

    Rotary embeddings and norms return float32 under autocast, while values stay in half precision. torch's
    attention then takes all of them in half precision, except float64.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or any(t.dtype == torch.float64 for t in tensors):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(kind)) for t in tensors]

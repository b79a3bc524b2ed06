"""Checks of tensor values that can be put off.

A check normally reads its tensor at once. While a CUDA graph is recorded, nothing may wait for the device, so
the checks are collected and made after each replay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """A condition, a () bool tensor on its device, and the function that makes the error if it is false."""

    holds: Tensor
    error: Callable[[], Exception]


_PUT_OFF: ContextVar[list[Check] | None] = ContextVar("pyglobenc_checks_put_off", default=None)


def require(holds: Tensor, error: Callable[[], Exception]) -> None:
    """Raise error() unless the condition, a () bool tensor, is true; `checks_put_off` delays the check."""
    checks = _PUT_OFF.get()
    if checks is not None:
        checks.append(Check(holds, error))
    elif not bool(holds):
        raise error()


def may_look() -> bool:
    """Return whether tensor values may be read now."""
    return _PUT_OFF.get() is None


def check_range(who: str, name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless all indices, of any shape, lie in [0, size); the message names who and name."""
    require(
        ((index >= 0) & (index < size)).all(),
        lambda: ValueError(
            f"{who}: {name} must lie in [0, {size}), got {int(index.min())} to {int(index.max())}"
        ),
    )


@contextmanager
def checks_put_off() -> Iterator[list[Check]]:
    """Return a context in which no tensor value is read; it yields the list that collects the checks."""
    checks: list[Check] = []
    token = _PUT_OFF.set(checks)
    try:
        yield checks
    finally:
        _PUT_OFF.reset(token)


def look(checks: list[Check]) -> None:
    """Raise the first error among checks that were put off; if there is none, the device is read once."""
    if checks and not bool(torch.stack([check.holds for check in checks]).all()):
        raise next(check.error() for check in checks if not bool(check.holds))

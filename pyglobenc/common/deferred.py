"""Checks of what tensors hold: at once, or, while a CUDA graph is recorded, which can't wait for the device, after each replay."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """A condition () bool, on its device, and the error if it doesn't hold."""

    holds: Tensor
    error: Callable[[], Exception]


_PUT_OFF: ContextVar[list[Check] | None] = ContextVar("pyglobenc_checks_put_off", default=None)


def require(holds: Tensor, error: Callable[[], Exception]) -> None:
    """Raise error() unless the condition () bool holds; within `checks_put_off` keep both for later."""
    checks = _PUT_OFF.get()
    if checks is not None:
        checks.append(Check(holds, error))
    elif not bool(holds):
        raise error()


def may_look() -> bool:
    """Whether values may be looked at now."""
    return _PUT_OFF.get() is None


def check_range(who: str, name: str, index: Tensor, size: int) -> None:
    """Raise ValueError, naming who, unless an argument's indices, of any shape, lie in [0, size)."""
    require(
        ((index >= 0) & (index < size)).all(),
        lambda: ValueError(f"{who}: {name} must lie in [0, {size}), got {int(index.min())} to {int(index.max())}"),
    )


@contextmanager
def checks_put_off() -> Iterator[list[Check]]:
    """Context within which no value is looked at; yields the list that checks are put on."""
    checks: list[Check] = []
    token = _PUT_OFF.set(checks)
    try:
        yield checks
    finally:
        _PUT_OFF.reset(token)


def look(checks: list[Check]) -> None:
    """Raise the first error among checks that were put off, with one wait for the device if there is none."""
    if checks and not bool(torch.stack([check.holds for check in checks]).all()):
        raise next(check.error() for check in checks if not bool(check.holds))

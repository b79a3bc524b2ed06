"""What can run here, and why the rest can't.

A backend of an op is a module `<room>.<op>` with a function named like the op and `not_supported(...)` of the same arguments, which
returns the reasons it can't run them. The reference runs everything.
"""

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from pyglobenc.backends.measurements import preferred

log = logging.getLogger("pyglobenc")

ROOMS = {
    "reference": "pyglobenc.backends.reference",
    "cpu": "pyglobenc.backends.cpu",
    "triton": "pyglobenc.kernels",
    "cuda": "pyglobenc.backends.cuda",
}
BACKENDS = ("auto", *ROOMS)
# as Triton reads it when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def check_backend(backend: str, who: str) -> None:
    """Raise ValueError unless backend is a name in BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"{who}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


@cache
def load(op: str, backend: str) -> tuple[Any, str | None]:
    """The backend's module for an op and None, or None and the reason that it doesn't load."""
    try:
        return importlib.import_module(f"{ROOMS[backend]}.{op}"), None
    except ImportError as error:
        return None, f"{backend} is not available: {error}"


def reasons(op: str, backend: str, args: tuple) -> list[str]:
    """Why a backend can't run an op on these arguments; empty when it can."""
    module, missing = load(op, backend)
    if module is None:
        return [missing]
    return [] if backend == "reference" else module.not_supported(*args)


def pick(op: str, backend: str, available: tuple[str, ...], args: tuple) -> Callable:
    """Function of the backend asked for, or, with "auto", of the first of `available` that can run.

    Where `pyglobenc bench` measured the device, here or for the package (`pyglobenc.backends.measurements`), "auto" tries the fastest first.

    Raises:
        ValueError: unknown name, or the backend asked for by name can't run; the reasons are in the message.
    """
    check_backend(backend, op)
    refused = []
    for name in preferred(op, available, _device(args)) if backend == "auto" else (backend,):
        why = reasons(op, name, args) if name in available else [f"{op} has no {name} kernel"]
        if not why and backend == "auto" and name == "triton" and INTERPRETED:
            why = ["runs interpreted, only when asked for by name"]
        if not why:
            if refused and backend == "auto":
                log_once(f"{op}: running on {name}; " + "; ".join(refused))
            return _runner(load(op, name)[0], op)
        refused += [f"{name}: {reason}" for reason in why]
    raise ValueError(f"{op}: backend {backend!r} can't run: " + "; ".join(refused))


@cache
def _runner(module: Any, op: str) -> Callable:
    """A backend's function for an op, whose own products the caller's autocast doesn't touch."""
    # torch takes seconds, which the command line's choices of a backend needn't
    from pyglobenc.common.autocast import outside_autocast

    return outside_autocast(getattr(module, op))


def _device(args: tuple) -> str:
    """Kind of device that the first tensor among args, or in a list there, lies on."""
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if hasattr(first, "device"):
            return first.device.type
    return "cpu"


@cache
def log_once(message: str) -> None:
    """Log a fallback the first time it happens."""
    log.info(message)

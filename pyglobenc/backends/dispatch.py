"""Finds the backend that runs an op on this machine, and gives the reason for each one that cannot.

A backend of an op is a module `<room>.<op>` with two functions of the same arguments: `run` computes the op,
and `why_not` returns the reasons that it can't. The reference runs everything and needs no `why_not`.
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
# Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def check_backend(backend: str, who: str) -> None:
    """Raise ValueError unless backend is a name in BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"{who}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


@cache
def load(op: str, backend: str) -> tuple[Any, str | None]:
    """Return the backend's module for an op and None, or None and the reason why the module does not load."""
    try:
        return importlib.import_module(f"{ROOMS[backend]}.{op}"), None
    except ImportError as error:
        return None, f"{backend} is not available: {error}"


def reasons(op: str, backend: str, args: tuple) -> list[str]:
    """Return the reasons why a backend can't run an op on these arguments; empty if it can."""
    module, missing = load(op, backend)
    if module is None:
        return [missing]
    return [] if backend == "reference" else module.why_not(*args)


def pick(op: str, backend: str, available: tuple[str, ...], args: tuple) -> Callable:
    """Return the function with which a backend runs the op on these arguments.

    It is that of the backend asked for. With "auto" it is that of the first backend in `available` that can
    run. "auto" tries the fastest backend first where the device has been measured
    (`pyglobenc.backends.measurements`).

    Raises:
        ValueError: the name is unknown, or the backend asked for by name can't run. The message gives the
            reasons.
    """
    check_backend(backend, op)
    refused = []
    for name in preferred(op, available, _device(args)) if backend == "auto" else (backend,):
        why = reasons(op, name, args) if name in available else [f"{op} has no {name} kernel"]
        if not why and backend == "auto" and name == "triton" and INTERPRETED:
            why = ["runs interpreted, and so only if it is asked for by name"]
        if not why:
            if refused and backend == "auto":
                log_once(f"{op}: running on {name}; " + "; ".join(refused))
            return _runner(load(op, name)[0])
        refused += [f"{name}: {reason}" for reason in why]
    raise ValueError(f"{op}: backend {backend!r} can't run: " + "; ".join(refused))


def run(op: str, backend: str, available: tuple[str, ...], *args: Any) -> Any:
    """Run an op on the backend that `pick` finds for its arguments, and return its result.

    The arguments are those of the op, in the order in which its backends take them.

    Raises:
        ValueError: no backend can run. The message gives the reasons.
    """
    return pick(op, backend, available, args)(*args)


@cache
def _runner(module: Any) -> Callable:
    """Return a backend's `run`, shielded from the caller's autocast."""
    # Importing torch takes seconds, and the command line needs only the names of the backends.
    from pyglobenc.common.autocast import outside_autocast

    return outside_autocast(module.run)


def _device(args: tuple) -> str:
    """Return the device type of the first argument that has a device, or of the first one in a list."""
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if hasattr(first, "device"):
            return first.device.type
    return "cpu"


@cache
def log_once(message: str) -> None:
    """Log a fallback the first time it happens."""
    log.info(message)

"""Types of the commands' numbers, whose errors argparse shows, and options that several commands have."""

import argparse
import os
from math import isfinite

# far above what any machine holds, and below what C code takes
LARGEST = 2**31 - 1
HOUR = 3600.0


def integer(text: str) -> int:
    """An integer within what C code takes."""
    value = int(text)
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"must lie in [-{LARGEST}, {LARGEST}], got {text[:40]!r}")
    return value


def positive(text: str) -> int:
    """An integer from 1 on."""
    value = integer(text)
    if value < 1:
        raise ValueError
    return value


def threads(text: str) -> int:
    """A number of threads that this machine has processors for; torch crashes when it can't start as many as
    it is told.
    """
    value, most = positive(text), os.cpu_count() or 1
    if value > most:
        raise argparse.ArgumentTypeError(
            f"must be at most {most}, the processors of this machine, got {value}"
        )
    return value


def seconds(text: str) -> float:
    """A time above 0, an hour at most."""
    value = float(text)
    if not (isfinite(value) and 0 < value <= HOUR):
        raise argparse.ArgumentTypeError(f"must be seconds above 0, at most {HOUR:.0f}, got {text[:40]!r}")
    return value


# argparse names the type in its error
integer.__name__, positive.__name__, threads.__name__, seconds.__name__ = (
    "int",
    "positive integer",
    "number of threads",
    "number",
)


def environment_number(name: str, default: int) -> int:
    """An environment variable's integer; ValueError, naming it, if it is something else."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the environment's {name} must be an integer, got {text[:40]!r}") from None


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Declare --trust-remote-code."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model (default: never)",
    )

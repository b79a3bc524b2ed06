"""Number types of the commands' options, whose errors argparse prints, and options that commands share."""

import argparse
import os
import re
from math import isfinite
from typing import Any

from pyglobenc.backends.dispatch import BACKENDS
from pyglobenc.inputs.windows import LONG

# This is far above what any machine can hold, and fits a C int.
LARGEST = 2**31 - 1
HOUR = 3600.0
DTYPES = ("float32", "float64")
WEIGHT_DTYPES = (*DTYPES, "bfloat16", "float16")


def integer(text: str) -> int:
    """Return the integer in an option's text; it must fit a C int."""
    value = int(text)
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"must lie in [-{LARGEST}, {LARGEST}], got {text[:40]!r}")
    return value


def token_or_class(text: str) -> int | str:
    """Return the target in an option's text: an integer, or the word "mean"."""
    return text if text == "mean" else integer(text)


def named(text: str) -> int | str:
    """Return the target in an option's text: an integer, or any other text, such as a label or a token."""
    return integer(text) if re.fullmatch("-?[0-9]+", text) else text


def span(text: str) -> tuple[int, int]:
    """Return the positions (start, stop) in an option's text, such as 10:20."""
    start, stop = text.split(":")
    return natural(start), natural(stop)


def natural(text: str) -> int:
    """Return the integer in an option's text; it must be at least 0."""
    value = integer(text)
    if value < 0:
        raise ValueError
    return value


def positive(text: str) -> int:
    """Return the integer in an option's text; it must be at least 1."""
    value = integer(text)
    if value < 1:
        raise ValueError
    return value


def threads(text: str) -> int:
    """Return the number of threads in an option's text; it must be at most the number of processors.

    torch crashes if it can't start as many threads as it is told to.
    """
    value, most = positive(text), os.cpu_count() or 1
    if value > most:
        raise argparse.ArgumentTypeError(
            f"must be at most {most}, the processors of this machine, got {value}"
        )
    return value


def seconds(text: str) -> float:
    """Return the seconds in an option's text; they must be above 0 and at most an hour."""
    value = float(text)
    if not (isfinite(value) and 0 < value <= HOUR):
        raise argparse.ArgumentTypeError(f"must be seconds above 0, at most {HOUR:.0f}, got {text[:40]!r}")
    return value


def portion(text: str) -> float:
    """Return the number in an option's text: 0, a part of 1, or a whole number."""
    value = float(text)
    if not (0 <= value <= LARGEST and (value < 1 or value == int(value))):
        raise ValueError
    return value


# argparse names the type in its error messages.
span.__name__ = "span of positions, such as 10:20"
integer.__name__, token_or_class.__name__, natural.__name__ = "int", "int or mean", "number of at least 0"
positive.__name__, threads.__name__, seconds.__name__ = (
    "positive integer",
    "number of threads",
    "number",
)


def listed(text: str) -> list[str]:
    """Return the names in an option's text, which are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


listed.__name__, portion.__name__ = "list of names", "number, whole or below 1"


def add_model(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    """Add the options --model and --trust-remote-code; `what` describes the default model."""
    parser.add_argument(
        "--model",
        default=default,
        help=f"name on the Hugging Face hub, folder, or {default} (default), {what}",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model (default: refuse it)",
    )


def dtype_named(name: str | None) -> Any:
    """Return the torch.dtype of an option's text, and None for None."""
    import torch

    return None if name is None else getattr(torch, name)


def add_target(parser: argparse.ArgumentParser, names: bool = False) -> None:
    """Add the option --target, a token or a class; with `names` also --contrast, and names for both."""
    parser.add_argument(
        "--target",
        type=named if names else token_or_class,
        help="token position (negative: from the end), mean (of all tokens' rows), or class index"
        f"{', label, or the next token' * names} (default: what the head reads, or the predicted class)",
    )
    if names:
        parser.add_argument(
            "--contrast", type=named, help="class index, label or next token whose logit is subtracted"
        )


def add_lengths(parser: argparse.ArgumentParser, first: str) -> None:
    """Add the options for texts that are too long; `first` says what is done by default."""
    parser.add_argument(
        "--long",
        choices=LONG,
        default="error",
        help=f"what to do with a text that is too long: {first} (default), cut it, or split it into "
        "overlapping windows",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        help="largest number of tokens, special tokens included (default: the model's limit)",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        help="tokens from the start of one window to the start of the next (default: half a window)",
    )


def add_arithmetic(parser: argparse.ArgumentParser, dtype: str = " float32", device: str = "") -> None:
    """Add the options for backend, dtypes and device; `dtype` and `device` tell more of their defaults."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="backend of the kernels (default: the fastest that runs here)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help=f"dtype of the attribution (default{dtype})")
    parser.add_argument(
        "--model-dtype", choices=WEIGHT_DTYPES, help="dtype of the weights (default: the checkpoint's)"
    )
    parser.add_argument("--device", help=f"cpu, cuda, cuda:1... (default: a GPU if there is one{device})")

"""Checks the fields of an `Attribution`, whether it was made in Python or read from a file."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

# Parquet and NumPy can store indices up to this one.
LARGEST = 2**63 - 1
TARGET_KINDS = ("token", "class", "mean")
DTYPES = ("float32", "float64")


def is_index(value: Any) -> bool:
    """Return whether a value is an integer from 0 to 2**63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def is_number(value: Any) -> bool:
    """Return whether a value is a finite float, or an integer of at most 64 bits."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_string(value: Any) -> bool:
    """Return whether a value is a str."""
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    """Return whether a value is a bool."""
    return isinstance(value, bool)


def is_pair(value: Any) -> bool:
    """Return whether a value is a pair (start, stop) of indices with start <= stop."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(map(is_index, value))
        and value[0] <= value[1]
    )


def is_prediction(value: Any) -> bool:
    """Return whether a value is a pair (name, number) of a string and a finite number."""
    return isinstance(value, list | tuple) and len(value) == 2 and is_string(value[0]) and is_number(value[1])


def or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check that also accepts None."""
    return lambda value: value is None or check(value)


def is_setting(value: Any) -> bool:
    """Return whether a value is a string, a flag, a finite number or None."""
    return value is None or is_string(value) or is_flag(value) or is_number(value)


SCALARS = {
    "text": (is_string, "a string"),
    "method": (is_string, "a string"),
    "model": (is_string, "a string"),
    "target": (is_index, "an integer of at least 0"),
    "target_name": (is_string, "a string"),
    "target_kind": (lambda value: value in TARGET_KINDS, f"one of {', '.join(TARGET_KINDS)}"),
    "log_scale": (is_number, "finite and a number"),
    "merge_words": (is_flag, "True or False"),
    "cut": (is_index, "an integer of at least 0"),
    "label": (or_none(is_string), "a string or None"),
    "probability": (
        or_none(lambda value: is_number(value) and 0 <= value <= 1),
        "a number in [0, 1] or None",
    ),
    "text_pair": (or_none(is_string), "a string or None"),
    "error": (or_none(lambda value: is_number(value) and value >= 0), "a number of at least 0 or None"),
    "contrast": (or_none(is_index), "an integer of at least 0 or None"),
    "contrast_name": (or_none(is_string), "a string or None"),
    "version": (is_string, "a string"),
}
# For each field: the check of an entry, its description, whether the field may be None, and whether it has
# n entries.
LISTS = {
    "tokens": (is_string, "strings", False, True),
    "token_ids": (is_index, "integers of at least 0", False, True),
    "special": (is_flag, "True or False", False, True),
    "word_ids": (or_none(is_index), "integers of at least 0 or None", True, True),
    "offsets": (is_pair, "pairs of integers, 0 <= start <= stop", True, True),
    "windows": (is_pair, "pairs of integers, 0 <= start <= stop", True, False),
    "parts": (lambda value: value is None or (is_index(value) and value < 2), "0, 1 or None", True, True),
    "predictions": (is_prediction, "pairs of a string and a finite number", True, False),
}


def check_fields(values: dict[str, Any]) -> None:
    """Check the fields of an `Attribution`.

    Args:
        values: all fields by name; scores is an array (n,).

    Raises:
        ValueError: a field has another type, length or range than `Attribution` describes. The message names
            the field.
    """
    for name, (check, expected) in SCALARS.items():
        check_scalar(name, values[name], check, expected)
    for name, (check, expected, optional, _) in LISTS.items():
        check_list(name, values[name], check, expected, optional)
    settings = values["settings"]
    if not isinstance(settings, dict) or not all(
        is_string(key) and is_setting(value) for key, value in settings.items()
    ):
        raise ValueError(
            f"settings must be a dict from strings to strings, finite numbers or None, got {shown(settings)}"
        )
    n = len(values["tokens"])
    if not n:
        raise ValueError("tokens must hold at least one token")
    for name, (_, _, _, has_n) in LISTS.items():
        if has_n and values[name] is not None and len(values[name]) != n:
            raise ValueError(f"{name} must have n = {n} entries, got {len(values[name])}")
    _check_scores(values["scores"], n)
    _check_together(values, n)


def check_scalar(name: str, value: Any, check: Callable[[Any], bool], expected: str) -> None:
    """Raise ValueError if a field's value doesn't pass a check; `expected` describes what does."""
    if not check(value):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")


def check_list(name: str, value: Any, check: Callable[[Any], bool], expected: str, optional: bool) -> None:
    """Raise ValueError if a field isn't a list whose entries pass a check; it may be None if optional."""
    if value is None and optional:
        return
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of {expected}, got {shown(value)}")
    for position, entry in enumerate(value):
        if not check(entry):
            raise ValueError(f"{name} must hold {expected}, got {shown(entry)} at position {position}")


def _check_scores(scores: np.ndarray, n: int) -> None:
    if scores.dtype.name not in DTYPES:
        raise ValueError(f"scores must be {' or '.join(DTYPES)}, got {scores.dtype}")
    if scores.shape != (n,):
        raise ValueError(f"scores must be (n,) = ({n},), got {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")


def _check_together(values: dict[str, Any], n: int) -> None:
    """Check the conditions that involve several fields."""
    if values["target_kind"] == "token" and values["target"] >= n:
        raise ValueError(f"target must be a position below n = {n}, got {values['target']}")
    if (values["contrast"] is None) != (values["contrast_name"] is None):
        raise ValueError("contrast and contrast_name must both be given, or both be None")
    if (values["text_pair"] is None) != (values["parts"] is None):
        raise ValueError("text_pair and parts must both be given, or both be None")
    if values["merge_words"] and values["word_ids"] is None:
        raise ValueError("merge_words needs word_ids, got None")
    for position, (_, stop) in enumerate(values["windows"] or ()):
        if stop > n:
            raise ValueError(f"windows must end at most at n = {n}, got {stop} at position {position}")


def shown(value: Any) -> str:
    """Return a value as an error message shows it: the value if it is short, else its beginning or type."""
    if isinstance(value, str):
        return repr(value[:40])
    if value is None or isinstance(value, float | bool):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) <= LARGEST else f"an integer of {value.bit_length()} bits"
    return type(value).__name__

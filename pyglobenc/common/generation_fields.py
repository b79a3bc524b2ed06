"""Checks the fields of a `GenerationAttribution`, whether it was made in Python or read from a file."""

from typing import Any

import numpy as np

from pyglobenc.common.result_fields import (
    DTYPES,
    check_list,
    check_scalar,
    is_flag,
    is_index,
    is_number,
    is_pair,
    is_setting,
    is_string,
    or_none,
    shown,
)

# For each list: the check of an entry, its description, whether it may be None, and its length, n or T.
LISTS = {
    "tokens": (is_string, "strings", False, "n"),
    "token_ids": (is_index, "integers of at least 0", False, "n"),
    "special": (is_flag, "True or False", False, "n"),
    "offsets": (is_pair, "pairs of integers, 0 <= start <= stop", True, "n"),
    "word_ids": (or_none(is_index), "integers of at least 0 or None", True, "n"),
    "probabilities": (lambda value: is_number(value) and 0 <= value <= 1, "numbers in [0, 1]", False, "T"),
    "log_scale": (is_number, "finite numbers", False, "T"),
    "error": (
        or_none(lambda value: is_number(value) and value >= 0),
        "numbers of at least 0 or None",
        True,
        "T",
    ),
}


def check_generation(values: dict[str, Any]) -> None:
    """Check the fields of a `GenerationAttribution`.

    Args:
        values: all fields by name; scores is an array (T, n).

    Raises:
        ValueError: a field has another type, length or range than the class describes. The message names it.
    """
    for name in ("text", "method", "model", "version"):
        check_scalar(name, values[name], is_string, "a string")
    check_scalar("target_kind", values["target_kind"], ("class", "token").__contains__, "class or token")
    check_scalar("prompt_length", values["prompt_length"], is_index, "an integer of at least 0")
    for name, (check, expected, optional, _) in LISTS.items():
        check_list(name, values[name], check, expected, optional)
    settings = values["settings"]
    if not isinstance(settings, dict) or not all(is_string(k) and is_setting(v) for k, v in settings.items()):
        raise ValueError(
            f"settings must be a dict from strings to strings, numbers or None, got {shown(settings)}"
        )
    n, first, scores = len(values["tokens"]), values["prompt_length"], values["scores"]
    if not 0 < first < n:
        raise ValueError(f"prompt_length must lie in [1, {n}), the tokens, got {first}")
    for name, (*_, size) in LISTS.items():
        wanted = n if size == "n" else n - first
        if values[name] is not None and len(values[name]) != wanted:
            raise ValueError(f"{name} must have {size} = {wanted} entries, got {len(values[name])}")
    if values["offsets"] and max(stop for _, stop in values["offsets"]) > len(values["text"]):
        raise ValueError("offsets must lie within the text")
    if scores.dtype.name not in DTYPES or scores.shape != (n - first, n):
        came = f"{scores.shape} in {scores.dtype}"
        raise ValueError(f"scores must be (T, n) = ({n - first}, {n}) in float32 or float64, got {came}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if np.triu(scores, first).any():
        raise ValueError("scores must be 0 from each generated token on")

"""Refuses unknown keyword arguments, with the nearest known names, and values of a wrong type."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from os import PathLike
from typing import Any

import numpy as np

# Two names whose difflib ratio is above this are taken for the same name, misspelt once.
ALIKE = 0.5
# The types that are checked, by their names in annotations, and how messages call them.
TYPES: dict[str, tuple[Any, str]] = {
    "None": (type(None), "None"),
    "bool": ((bool, np.bool_), "True or False"),
    "str": (str, "a string"),
    "int": (Integral, "an integer"),
    "float": (Real, "a number"),
    "Path": (PathLike, "a path"),
}
KINDS = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def refuse_unknown(who: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError if there is an unknown name; the message suggests the nearest known names.

    Args:
        who: name of the function or class for the message.
        unknown: the unknown names; nothing happens if there are none.
        known: the names that are allowed. The message lists all of them if none is near.
    """
    unknown, known = sorted(unknown), sorted(known)
    if not unknown:
        return
    near = dict.fromkeys(match for name in unknown for match in get_close_matches(name, known, 1, ALIKE))
    hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(known)}"
    raise TypeError(f"{who}: takes no {' or '.join(unknown)}; {hint}")


def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's arguments that can be given by keyword, without self."""
    return frozenset(p.name for p in signature(function).parameters.values() if p.kind in KINDS) - {"self"}


def known_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that unknown keyword arguments and values of a wrong type are refused.

    Unknown names are refused by `refuse_unknown`. A function that takes any name must check the names itself.
    Types are checked for the arguments whose annotation is one of TYPES, with or without None.
    """
    parameters, names = signature(function).parameters.values(), argument_names(function)
    types = {p.name: kinds for p in parameters if (kinds := _types(p.annotation)) is not None}
    ordered = [p.name for p in parameters if p.kind == Parameter.POSITIONAL_OR_KEYWORD]
    others = any(p.kind == Parameter.VAR_KEYWORD for p in parameters)
    owner, _, name = function.__qualname__.rpartition(".")
    who = owner or name

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not others and not kwargs.keys() <= names:
            refuse_unknown(who, kwargs.keys() - names, names)
        for given in (zip(ordered, args, strict=False), kwargs.items()):
            for name, value in given:
                if name in types and not _is_one_of(value, types[name]):
                    wanted = " or ".join(TYPES[kind][1] for kind in types[name] if kind != "None")
                    raise TypeError(f"{who}: {name} must be {wanted}, got {_shown(value)}")
        return function(*args, **kwargs)

    return call


def _types(annotation: Any) -> tuple[str, ...] | None:
    """Return the names in TYPES that an annotation consists of: one, or a path's, with or without None.

    The result is None for other annotations.
    """
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = tuple(kind.rpartition(".")[2] for kind in text.split(" | "))
    # A union of other types is checked where its values mean something.
    one = len(set(kinds) - {"None"}) == 1 or set(kinds) - {"None"} == {"str", "Path"}
    return kinds if one and all(kind in TYPES for kind in kinds) else None


def _is_one_of(value: Any, kinds: tuple[str, ...]) -> bool:
    if isinstance(value, bool):
        # Python counts bools as integers.
        return "bool" in kinds
    return any(isinstance(value, TYPES[kind][0]) for kind in kinds)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

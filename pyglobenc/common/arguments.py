"""Refuses unknown keyword arguments, and suggests the nearest known names."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any

# Two names whose difflib ratio is above this are taken for the same name, misspelt once.
ALIKE = 0.5
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
    """Decorate a function so that unknown keyword arguments are refused by `refuse_unknown`."""
    names = argument_names(function)
    owner, _, name = function.__qualname__.rpartition(".")
    who = owner if name in ("__init__", "__call__") else name

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= names:
            refuse_unknown(who, kwargs.keys() - names, names)
        return function(*args, **kwargs)

    return call

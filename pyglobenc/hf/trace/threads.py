"""Limits a capture to its own thread, while every other thread runs the plain model.

A capture changes hooks, the config's attention implementation and the compiler's stance, and all threads see
these changes. Therefore each hook asks which thread calls it. A config returns each thread's own attention
implementation. Captures that overlap in time share one stance.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock, get_ident
from typing import Any

import torch
from transformers import PreTrainedConfig

_LOCK = Lock()
# id of a config -> thread -> names of attention implementations; the last name is in use
_IMPLEMENTATIONS: dict[int, dict[int, list[str]]] = {}
# the stance that all captures share, and the number of captures
_STANCE: list[Any] = [None, 0]


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a module's hook so that it does nothing in other threads than this one.

    The wrapper takes any arguments. Another thread may call the hook before torch has noted that it takes
    keyword arguments.
    """
    thread = get_ident()

    def call(*args: Any) -> Any:
        return hook(*args) if get_ident() == thread else None

    return call


@contextmanager
def attention_in_this_thread(configs: Iterable[PreTrainedConfig], name: str) -> Iterator[None]:
    """Set the attention implementation of configs for this thread only, inside the context.

    Args:
        configs: the configs; other threads go on reading their former attention implementation.
        name: name of the attention implementation, as registered with transformers.
    """
    # The configs are collected by id, because a set would need their hash.
    configs, thread = list({id(config): config for config in configs}.values()), get_ident()
    with _LOCK:
        for config in configs:
            if id(config) not in _IMPLEMENTATIONS:
                _IMPLEMENTATIONS[id(config)] = {}
                object.__setattr__(config, "__class__", _by_thread(type(config)))
            _IMPLEMENTATIONS[id(config)].setdefault(thread, []).append(name)
    try:
        yield
    finally:
        with _LOCK:
            for config in configs:
                names = _IMPLEMENTATIONS[id(config)]
                names[thread].remove(name)
                if not names[thread]:
                    del names[thread]
                if not names:
                    object.__setattr__(config, "__class__", type(config).__base__)
                    del _IMPLEMENTATIONS[id(config)]


@cache
def _by_thread(kind: type) -> type:
    """Return a subclass of a config class that returns each thread's own attention implementation."""

    class ByThread(kind):
        @property
        def _attn_implementation(self) -> str | None:
            names = _IMPLEMENTATIONS.get(id(self), {}).get(get_ident())
            return names[-1] if names else kind._attn_implementation.fget(self)

        @_attn_implementation.setter
        def _attn_implementation(self, value: Any) -> None:
            kind._attn_implementation.fset(self, value)

        def __reduce_ex__(self, protocol: int) -> tuple:
            # A copy, and a config loaded from a pickle, has the plain class.
            return _new, (kind,), *super().__reduce_ex__(protocol)[2:]

    ByThread.__name__, ByThread.__qualname__, ByThread.__module__ = (
        kind.__name__,
        kind.__qualname__,
        kind.__module__,
    )
    return ByThread


def _new(kind: type) -> Any:
    return kind.__new__(kind)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run models uncompiled inside the context, because compiled code does not call hooks."""
    with _LOCK:
        if not _STANCE[1]:
            _STANCE[0] = torch.compiler.set_stance("force_eager")
        _STANCE[1] += 1
    try:
        yield
    finally:
        with _LOCK:
            _STANCE[1] -= 1
            if not _STANCE[1]:
                _STANCE[0].__exit__(None, None, None)

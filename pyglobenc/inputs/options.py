"""The options of `explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyglobenc.common.result_fields import is_number
from pyglobenc.inputs.windows import LONG

if TYPE_CHECKING:
    import torch


SPANS = ("target_span", "reasoning_span")


@dataclass(frozen=True)
class Options:
    """The options of `explain`; invalid values raise TypeError or ValueError."""

    method: str = "globenc"
    target: int | str | None = None
    contrast: int | str | None = None
    start_layer: int = 0
    target_span: tuple[int, int] | None = None
    reasoning_span: tuple[int, int] | None = None
    hops: int | None = None
    merge_words: bool = False
    long: str = "error"
    max_length: int | None = None
    stride: int | None = None
    batch_size: int = 8
    backend: str = "auto"
    dtype: torch.dtype | None = None
    progress: bool = True
    packed: bool | None = False  # batches without padding; None: if the model supports it and it is faster

    def __post_init__(self):
        if self.long not in LONG:
            raise ValueError(f"explain: long must be one of {', '.join(LONG)}, got {self.long!r}")
        for name in ("target", "contrast", "start_layer", "hops", "max_length", "stride", "batch_size"):
            value = getattr(self, name)
            if name in ("target", "contrast") and isinstance(value, str):
                continue
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"explain: {name} must be an integer, got {value!r}")
            if value is not None and not is_number(value):
                raise ValueError(f"explain: {name} must fit in 64 bits, got {value!r:.80}")
        for name in SPANS:
            _check_span(name, getattr(self, name))
        if self.target_span is not None and self.target is not None:
            raise ValueError("explain: target and target_span exclude each other")
        if self.spans and self.long == "windows":
            raise ValueError(
                f"explain: {', '.join(self.spans)} with long='windows': a span has its place in a whole text"
            )
        if self.batch_size < 1:
            raise ValueError(f"explain: batch_size must be at least 1, got {self.batch_size}")

    @property
    def spans(self) -> dict[str, Any]:
        """Return those of target_span, reasoning_span and hops that were given."""
        names = (*SPANS, "hops")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def record(self) -> dict[str, Any]:
        """Return the options that an attribution keeps, as JSON values."""
        names = ("target", "contrast", "start_layer", "long", "max_length", "stride", "batch_size", "backend")
        spans = {name: written(value) if name in SPANS else value for name, value in self.spans.items()}
        return (
            {name: getattr(self, name) for name in names}
            | spans
            | {"dtype": None if self.dtype is None else str(self.dtype).split(".")[-1]}
        )


def written(span: tuple[int, int]) -> str:
    """Return a span as the command line takes it, such as 10:20."""
    return f"{span[0]}:{span[1]}"


def _check_span(name: str, span: Any) -> None:
    if span is None:
        return
    ends = span if isinstance(span, tuple | list) else ()
    if len(ends) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise TypeError(f"explain: {name} must be two integers (start, stop), got {span!r:.80}")
    if not 0 <= ends[0] < ends[1]:
        raise ValueError(f"explain: {name} must have 0 <= start < stop, got {span!r:.80}")

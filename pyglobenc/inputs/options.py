"""The options of `explain`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyglobenc.common.result_fields import is_number
from pyglobenc.inputs.windows import LONG

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """The options of `explain`; invalid values raise TypeError or ValueError."""

    method: str = "globenc"
    target: int | str | None = None
    contrast: int | str | None = None
    start_layer: int = 0
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
        for name in ("target", "contrast", "start_layer", "max_length", "stride", "batch_size"):
            value = getattr(self, name)
            if name in ("target", "contrast") and isinstance(value, str):
                continue
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"explain: {name} must be an integer, got {value!r}")
            if value is not None and not is_number(value):
                raise ValueError(f"explain: {name} must fit in 64 bits, got {value!r:.80}")
        if self.batch_size < 1:
            raise ValueError(f"explain: batch_size must be at least 1, got {self.batch_size}")

    def record(self) -> dict[str, Any]:
        """Return the options that an attribution keeps, as JSON values."""
        names = ("target", "contrast", "start_layer", "long", "max_length", "stride", "batch_size", "backend")
        return {name: getattr(self, name) for name in names} | {
            "dtype": None if self.dtype is None else str(self.dtype).split(".")[-1]
        }

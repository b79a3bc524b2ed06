"""The data that a picture shows: tokens or words with their scores, and the facts of the caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Unit:
    """A token, or the merged tokens of one word, as pictures show it."""

    text: str  # the characters in the text; the token's name if its position isn't known
    before: str  # white space between it and the unit before
    score: float  # sum of its tokens' scores
    special: bool
    positions: tuple[int, ...]  # of its tokens, ascending


class Scored(Protocol):
    """A text with scores; `pyglobenc.results.Attribution` is one."""

    text: str
    method: str
    model: str
    target: int
    target_kind: str
    target_name: str
    contrast: int | None
    contrast_name: str | None
    label: str | None
    probability: float | None
    windows: list[tuple[int, int]] | None
    offsets: list[tuple[int, int]] | None
    cut: int
    settings: dict[str, Any]

    def units(self, merge_words: bool | None = None) -> Sequence[Unit]:
        """Return the tokens or words that a picture shows."""

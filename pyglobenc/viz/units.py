"""What a picture shows: tokens or words with their scores, and the facts of the caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Unit:
    """A token, or the tokens of one word merged, as pictures show it."""

    text: str  # as the text has it, where the tokenizer says where it stands
    before: str  # white space between it and the unit before
    score: float  # sum of its tokens' scores
    special: bool
    positions: tuple[int, ...]  # of its tokens, ascending


class Scored(Protocol):
    """A text with scores, as `pyglobenc.results.Attribution` has them."""

    text: str
    method: str
    model: str
    target: int
    target_kind: str
    target_name: str
    label: str | None
    probability: float | None
    windows: list[tuple[int, int]] | None
    offsets: list[tuple[int, int]] | None
    cut: int

    def units(self, merge_words: bool | None = None) -> Sequence[Unit]:
        """Return the tokens, or words, that a picture shows."""

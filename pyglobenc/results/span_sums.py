"""Sums of scores over spans of a text, such as sentences, and the pictures of them."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyglobenc.common.files import write_file
from pyglobenc.viz.heatmap import Heat

# A sentence ends after these characters and what closes around them, if white space follows, and at a new
# line. The marks of Chinese and Japanese need no white space.
SENTENCE_END = re.compile(
    r"""[.!?\u2026]+["')\]\u201d\u2019]*(?=\s)|[\u3002\uff01\uff1f]+["'\u201d\u300d\u300f]*|\n+"""
)


@dataclass(frozen=True)
class SpanSums:
    """Sums of scores over spans, such as sentences; pictures show it as a heat map.

    Attributes:
        sources: texts of the C spans whose tokens' scores were added.
        targets: texts of the R spans of generated tokens whose rows were added.
        scores: (R, C) float64.
        caption: pairs (name, value) that pictures show.
    """

    sources: list[str]
    targets: list[str]
    scores: np.ndarray
    caption: tuple[tuple[str, str], ...] = ()

    def heat(self) -> Heat:
        """Return what pictures show."""
        return Heat(list(self.caption), self.targets, self.sources, self.scores)

    def show(self) -> None:
        """Print the heat map in the terminal."""
        from pyglobenc.viz import heatmap

        heatmap.show(self.heat())

    def to_html(self, path: str | Path | None = None) -> str:
        """Return a self-contained HTML page, and write it to path if given."""
        from pyglobenc.viz import heatmap

        page = heatmap.page(self.heat())
        if path is not None:
            write_file(path, page.encode("utf-8"))
        return page

    def to_png(self, path: str | Path | None = None) -> bytes:
        """Return a PNG picture, and write it to path if given."""
        from pyglobenc.viz import heatmap

        picture = heatmap.png(self.heat())
        if path is not None:
            write_file(path, picture)
        return picture


def sentence_ends(text: str, *others: int) -> list[int]:
    """Return where the sentences of a text end, as numbers of characters, ascending.

    Args:
        text: the text.
        others: further places where a sentence ends.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return sorted({*ends, *others, len(text)})

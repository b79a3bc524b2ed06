"""Draws a table of scores as a heat map: in the terminal, as an HTML page, and as a PNG picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from pyglobenc.common.characters import printable
from pyglobenc.viz.common import RGB, color
from pyglobenc.viz.units import Scored

if TYPE_CHECKING:
    from rich.console import Console

# A page or a picture with more columns would be too wide, and a page with more cells too large to scroll.
PAGE_CELLS, PAGE_COLUMNS, PICTURE_COLUMNS = 20_000, 400, 90
# Characters of a row's name, and of the widest cell, in the terminal; sources that each row names there.
NAME, CELL, NAMED = 14, 3, 3
# Of the PNG picture: inches of a cell's side, of the names, and dots per inch.
SIDE, NAMES, DPI = 0.2, 1.6, 150
# matplotlib's Agg renderer draws fewer than 2**16 pixels per side, and nobody looks at taller pictures.
TALLEST = 30_000
# A name in a picture is cut to this many characters.
LONGEST = 24

STYLE = """
.globenc .heat { overflow-x: auto; margin: 0 0 1rem; }
.globenc .heat table { width: auto; font-size: .75rem; }
.globenc .heat td { padding: 0; min-width: .9rem; height: 1.1rem; }
.globenc .heat th { white-space: nowrap; padding: .1rem .3rem; color: #222; }
.globenc .heat th.source { writing-mode: vertical-rl; transform: rotate(180deg); padding: .2rem 0; }
.globenc .heat th.special { color: #888; }
.globenc .heat .first { border-left: 2px solid #222; }
"""


@dataclass
class Heat:
    """A table of scores (R, C) with the names of its rows and columns.

    Attributes:
        caption: pairs (name, value).
        rows, columns: the R and C names.
        values: (R, C) scores.
        notes: a short text for each row, such as a probability; None for none.
        special: flags of the columns of special tokens, which don't count for the colours; None for none.
        border: the first column of the answer; None if there is no such border.
    """

    caption: Sequence[tuple[str, str]]
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    notes: Sequence[str] | None = None
    special: Sequence[bool] | None = None
    border: int | None = None

    def __post_init__(self):
        self.rows = [_name(text) for text in self.rows]
        self.columns = [_name(text) for text in self.columns]
        self.special = self.special or [False] * len(self.columns)
        self.notes = self.notes or [""] * len(self.rows)
        ordinary = self.values[:, ~np.asarray(self.special, dtype=bool)]
        largest = np.abs(ordinary).max(1, initial=0)
        # Each row has a scale of its own: rows of different tokens differ by orders of magnitude.
        self.shades = self.values / np.where(largest > 0, largest, 1)[:, None]

    def strongest(self, most: int) -> list[int]:
        """Return the columns that hold the largest scores of any row, at most `most` of them, in order."""
        if len(self.columns) <= most:
            return list(range(len(self.columns)))
        size = np.abs(self.shades).max(0, initial=0)
        return sorted(np.argsort(-size, kind="stable")[:most].tolist())

    def top(self, row: int, count: int) -> list[int]:
        """Return the columns of a row with the largest absolute scores, without special tokens and zeros."""
        order = np.argsort(-np.abs(self.values[row]), kind="stable").tolist()
        return [i for i in order if self.values[row, i] != 0 and not self.special[i]][:count]


def _name(text: str) -> str:
    return printable(" ".join(text.split()) or text)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _hex(rgb: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def show(heat: Heat, console: Console | None = None) -> None:
    """Print a row of coloured cells for each row of the table, followed by its largest sources.

    A cell stands for one column, or for several where the terminal has no room. It then has the colour of the
    score that is largest in absolute value.

    Args:
        heat: the table.
        console: console to print to; None for standard output.
    """
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    console = console or Console(highlight=False)
    # A console that doesn't know its width says 0.
    console.width = console.width or 80
    more = "..." if console.options.ascii_only else "\u2026"
    head = Text()
    for index, (name, value) in enumerate(heat.caption):
        head.append("   " if index else "").append(f"{name} ", style="dim").append(
            printable(value), style="bold"
        )
    console.print(head)
    colored = console.color_system is not None
    if colored:
        edge = "" if heat.border is None else f"; the first {heat.border} are the prompt"
        said = f"cells: all {len(heat.columns)} sources in order{edge}; then the largest sources"
        console.print(Text(said, style="dim"))
    columns, width = len(heat.columns), max(8, (console.width - NAME - 8) // 2)
    wide = max(1, min(CELL, width // max(columns, 1)))
    bins = np.array_split(np.arange(columns), max(1, min(columns, width)))
    note = max(map(len, heat.notes), default=0)
    for row, name in enumerate(heat.rows):
        short = name if len(name) <= NAME else name[: NAME - len(more)] + more
        line = Text(f"{short:>{NAME}} {heat.notes[row]:>{note}} ", no_wrap=True, overflow="ellipsis")
        # Without colours the strip would be nothing but spaces.
        for group in bins if colored else ():
            shade = max((float(heat.shades[row, i]) for i in group), key=abs, default=0.0)
            line.append(" " * wide, style=Style(bgcolor=_hex(color(shade))))
        top = (f"{heat.columns[i]} {heat.values[row, i]:.2g}" for i in heat.top(row, NAMED))
        console.print(line.append("  " + ", ".join(top)), soft_wrap=False, crop=True)


def fragment(heat: Heat, whole: Scored | None = None, heading: str = "") -> str:
    """Return the part of a page that a notebook shows.

    Args:
        heat: the table.
        whole: an attribution of the whole text that is shown below the table; None for none.
        heading: HTML of the heading.
    """
    from pyglobenc.viz import html

    most = max(1, min(PAGE_COLUMNS, PAGE_CELLS // max(1, len(heat.rows))))
    shown = heat.strongest(most)
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(printable(value))}</dd></div>"
        for name, value in heat.caption
    )
    head = "".join(
        f'<th class="source{" special" * bool(heat.special[i])}{" first" * (i == heat.border)}">'
        f"{escape(_cut(heat.columns[i], LONGEST))}</th>"
        for i in shown
    )
    body = "".join(_row(heat, row, shown) for row in range(len(heat.rows)))
    left = len(heat.columns) - len(shown)
    note = (
        "A row explains one generated token or span. Its colours are scaled by its own largest score, "
        "without special tokens." + f" The {left} columns with the smallest scores are left out." * (left > 0)
    )
    table = f'<div class="heat"><table><tr><th></th><th></th>{head}</tr>\n{body}</table></div>\n'
    section = f'<section>\n<dl>{pairs}</dl>\n{table}<p class="legend">{note}</p></section>\n'
    below = "" if whole is None else html.fragment([whole], merge_words=False)
    return f'<style>{html.STYLE}{STYLE}</style>\n<div class="globenc">\n{heading}\n{section}</div>\n{below}'


def _row(heat: Heat, row: int, shown: Sequence[int]) -> str:
    colors = {i: _hex(color(float(heat.shades[row, i]))) for i in shown}
    cells = "".join(
        f'<td{" class=first" * (i == heat.border)} style="background:{colors[i]}" '
        f'title="{escape(heat.columns[i])}: {heat.values[row, i]:.4g}"></td>'
        for i in shown
    )
    name, note = escape(_cut(heat.rows[row], 4 * LONGEST)), escape(printable(heat.notes[row]))
    return f'<tr><th>{name}</th><th class="number">{note}</th>{cells}</tr>\n'


def page(heat: Heat, whole: Scored | None = None) -> str:
    """Return a whole HTML page of the table, and of an attribution of the whole text if there is one."""
    from pyglobenc.viz import html

    return html.document(fragment(heat, whole, "<h1>Token attribution</h1>"))


def png(heat: Heat) -> bytes:
    """Return a PNG picture of the table.

    Raises:
        ValueError: there are too many rows for a picture, or no cells.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown, count = heat.strongest(PICTURE_COLUMNS), len(heat.rows)
    if not shown or not count:
        raise ValueError("png: the table has no cells")
    size = (NAMES + SIDE * len(shown) + 0.3, NAMES + SIDE * count + 0.6)
    if size[1] * DPI > TALLEST:
        raise ValueError(
            f"png: {count} rows need a picture more than {TALLEST} pixels high; write HTML instead"
        )
    figure = Figure(figsize=(max(size[0], 6.0), size[1]), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    place = (NAMES / width, 0.1 / height, SIDE * len(shown) / width, SIDE * count / height)
    axes = figure.add_axes(place)
    colors = [[color(float(heat.shades[row, i])) for i in shown] for row in range(count)]
    axes.imshow(np.array(colors, dtype=np.uint8).reshape(count, len(shown), 3), aspect="auto")
    names = [
        f"{_cut(name, LONGEST)} {note}".strip() for name, note in zip(heat.rows, heat.notes, strict=True)
    ]
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(shown)), [_cut(heat.columns[i], LONGEST) for i in shown], rotation=90)
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0, labelsize=7)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        # Dollar signs in a text are no formulas, whatever the user's settings are.
        label.set(parse_math=False, usetex=False)
    if heat.border is not None:
        edge = sum(i < heat.border for i in shown) - 0.5
        axes.axvline(edge, color="black", linewidth=1)
    left = len(heat.columns) - len(shown)
    caption = "   ".join(f"{name} {printable(value)}" for name, value in heat.caption)
    caption += f"   the {left} columns with the smallest scores are left out" * (left > 0)
    figure.text(0.1 / width, 1 - 0.1 / height, caption, va="top", fontsize=7, parse_math=False, usetex=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()

"""Draws coloured text as a PNG picture with matplotlib, without a display."""

import logging
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from io import BytesIO

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.transforms import IdentityTransform

from pyglobenc.common.characters import printable
from pyglobenc.viz.common import DARK, RGB, caption, check_columns, color, ink, remainder, scale_of
from pyglobenc.viz.units import Scored, Unit

log = logging.getLogger("pyglobenc")

# Lengths are in pixels at this resolution.
DPI = 150
WIDTH, MARGIN, LINE, GAP, PAD = 1500, 45, 46, 50, 5
# Of each picture, if several stand side by side.
COLUMN = 1000
SIZE, SMALL = 13, 9  # points
ASCENT, DESCENT = 1.75, 0.75  # of a box above and below the base line, in pixels per point
LEGEND_WIDTH, LEGEND_STEPS = 300, 60
MARKS = "the largest score of the text; framed: the target; dashed: special tokens"
# matplotlib's Agg renderer draws fewer than 2**16 pixels per side, and nobody looks at taller pictures.
TALLEST = 30_000
ROOM = WIDTH - 2 * MARGIN
# Characters of these Unicode categories are drawn over others or not at all.
NARROW = ("Mn", "Me", "Cf")
# A character that one font lacks is looked for in the next one.
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Noto Sans",
    "Noto Emoji",
    "Symbola",
)
GREY = (110, 110, 110)


@dataclass
class Piece:
    """A piece of text, its style, and its position in the picture."""

    text: str
    before: str = " "
    size: int = SIZE
    ink: RGB = DARK
    fill: RGB | None = None
    edge: str = "none"  # or "target", "special"
    x: float = 0.0  # left end, in pixels from the left
    y: float = 0.0  # base line, in pixels from the top
    width: float = 0.0


@dataclass
class Legend:
    """The colour bar of one attribution, from the lowest score `low` to the largest one `high`."""

    x: float  # left end, in pixels from the left
    y: float  # base line, in pixels from the top
    low: float
    high: float


def picture(attributions: Sequence[Scored], merge_words: bool | None = None, columns: int = 1) -> bytes:
    """Return a PNG file of one or more attributions.

    Args:
        attributions: attributions of one or more texts.
        merge_words: as for `Attribution.units`.
        columns: how many attributions stand side by side in a row.

    Raises:
        TypeError, ValueError: columns is no integer of at least 1, or there is too much text for a picture.
    """
    check_columns("png", columns)
    columns = max(1, min(columns, len(attributions)))
    width = WIDTH if columns == 1 else COLUMN
    if columns > 1 and columns * width > TALLEST:
        raise ValueError(f"png: {columns} columns need a picture more than {TALLEST} pixels wide")
    placed, legends, top = [], [], float(MARGIN)
    with warnings.catch_warnings():
        # `_warn_of_missing` reports this once.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        _check_height(_least_height(attributions, merge_words, width) / columns)
        for start in range(0, len(attributions), columns):
            ends = []
            for number, attribution in enumerate(attributions[start : start + columns]):
                cell: list[Piece] = []
                legend, end = _lay_out_one(attribution, attribution.units(merge_words), cell, top, width)
                placed += [replace(piece, x=piece.x + number * width) for piece in cell]
                legends.append(replace(legend, x=legend.x + number * width))
                ends.append(end)
            top = max(ends) + GAP
            _check_height(top)
        _warn_of_missing(piece.text for piece in placed)
        return _draw(placed, legends, round(top - GAP), width * columns)


def _lay_out_one(
    attribution: Scored, units: Sequence[Unit], placed: list[Piece], y: float, width: int
) -> tuple[Legend, float]:
    """Place the pieces of one attribution below y, and return its legend and the end of its picture."""
    scale = scale_of(units)
    y = _lay_out(_caption(attribution), placed, y, LINE * 0.6, width) + LINE * 1.4
    y = _lay_out(_text(attribution, units, scale), placed, y, LINE, width) + LINE
    low = -scale if any(unit.score < 0 for unit in units) else 0.0
    legend = Legend(MARGIN + _width(f"{low:.4g}", SMALL) + 12, y, low, scale)
    placed.append(Piece(f"{low:.4g}", "", SMALL, GREY, x=MARGIN, y=y))
    marks = (Piece(word, " ", SMALL, GREY) for word in f"{scale:.4g}, {MARKS}".split())
    return legend, _lay_out(marks, placed, y, LINE * 0.6, width, legend.x + LEGEND_WIDTH) + LINE


def _caption(attribution: Scored) -> Iterator[Piece]:
    for index, (name, value) in enumerate(caption(attribution)):
        yield Piece(name, "   " if index else "", SMALL, GREY)
        yield Piece(value, " ", SMALL)


def _text(attribution: Scored, units: Sequence[Unit], scale: float) -> Iterator[Piece]:
    for unit in units:
        fill = color(unit.score / scale)
        is_target = attribution.target_kind == "token" and attribution.target in unit.positions
        edge = "target" if is_target else "special" if unit.special else "none"
        yield Piece(printable(unit.text), printable(unit.before, newlines=True), SIZE, ink(fill), fill, edge)
    for line in printable(remainder(attribution), newlines=True).splitlines():
        for word in line.split(" "):
            yield Piece(word, " ", SIZE, GREY)


def _lay_out(
    pieces: Iterable[Piece],
    placed: list[Piece],
    y: float,
    spacing: float,
    width: int = WIDTH,
    x: float = MARGIN,
) -> float:
    """Place pieces in lines from base line y down, append them to `placed`, and return the last base line.

    The first line begins at x, the others at the margin. All lines end at the margin of the width.
    """
    for piece in pieces:
        lines, pad = piece.before.count("\n"), PAD * (piece.fill is not None)
        if lines:
            x, y = float(MARGIN), y + spacing * min(lines, 2)
        elif piece.before and x > MARGIN:
            x += _width(" ", piece.size) * min(len(piece.before), 3)
        for text in _split(piece.text, piece.size, width - 2 * MARGIN):
            taken = _width(text, piece.size) + 2 * pad
            if x + taken > width - MARGIN and x > MARGIN:
                x, y = float(MARGIN), y + spacing
            _check_height(y)
            placed.append(Piece(text, "", piece.size, piece.ink, piece.fill, piece.edge, x, y, taken))
            x += taken
    return y


def _check_height(y: float) -> None:
    if y > TALLEST:
        raise ValueError(f"png: the text needs a picture more than {TALLEST} pixels high; write HTML instead")


def _split(text: str, size: int, room: int = ROOM) -> Iterator[str]:
    """Split a text into parts that fit into one line each, in time linear in the length of the text.

    Lines are filled by the widths of single characters.
    """
    room, start, used = room - 2 * PAD, 0, 0.0
    for stop, char in enumerate(text):
        used += _advance(char, size)
        if used > room and stop > start:
            yield from _fitting(text[start:stop], size, room)
            start, used = stop, _advance(char, size)
    yield from _fitting(text[start:], size, room)


def _fitting(text: str, size: int, room: float) -> Iterator[str]:
    """Yield a part unchanged, or cut again if its characters are wider together than one by one."""
    while (width := _width(text, size)) > room and len(text) > 1:
        count = max(1, min(len(text) - 1, int(len(text) * room / width)))
        yield from _fitting(text[:count], size, room)
        text = text[count:]
    yield text


def _advance(char: str, size: int) -> float:
    """Return the width of a single character, at least a pixel, so that every line is full at some time."""
    return 1.0 if unicodedata.category(char) in NARROW else max(1.0, _width(char, size))


def _least_height(attributions: Sequence[Scored], merge_words: bool | None, width: int) -> float:
    """Return a lower bound of the height of a column of this width, from the widths of characters alone."""
    least = 0.0
    for attribution in attributions:
        units = attribution.units(merge_words)
        letters = Counter(char for unit in units for char in unit.text)
        length = sum(_advance(char, SIZE) * count for char, count in letters.items()) + 2 * PAD * len(units)
        least += LINE * length / (width - 2 * MARGIN)
    # Letters side by side may be a little narrower than the sum of their widths.
    return 0.9 * least


@cache
def _fonts() -> list[str]:
    have = set(font_manager.get_font_names())
    return [name for name in FONTS if name in have] or ["sans-serif"]


@cache
def _properties(size: int) -> font_manager.FontProperties:
    return font_manager.FontProperties(family=_fonts(), size=size)


@cache
def _renderer():
    return FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()


# Tokens repeat, and each measurement takes a millisecond.
@lru_cache(maxsize=1 << 14)
def _width(text: str, size: int) -> float:
    return _renderer().get_text_width_height_descent(text, _properties(size), ismath=False)[0]


def _warn_of_missing(texts: Iterable[str]) -> None:
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in _fonts()]
    missing = {
        char for text in texts for char in text if not any(font.get_char_index(ord(char)) for font in fonts)
    }
    if missing:
        log.warning(
            "png: no font here has %s; they are drawn as boxes (install a Noto font, or write HTML)",
            "".join(sorted(missing))[:20],
        )


def _draw(pieces: Sequence[Piece], legends: Sequence[Legend], height: int, width: int) -> bytes:
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    for piece in pieces:
        if piece.fill is not None:
            _box(figure, piece, height)
        _write(figure, piece, height)
    for legend in legends:
        _draw_legend(figure, legend, height)
    out = BytesIO()
    FigureCanvasAgg(figure).print_png(out)
    return out.getvalue()


def _unit(rgb: RGB) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in rgb)


def _box(figure: Figure, piece: Piece, height: int) -> None:
    edge, line, style = {
        "none": ("none", 0, "-"),
        "target": ("black", 1.5, "-"),
        "special": ("#777777", 0.8, "--"),
    }[piece.edge]
    corner = (piece.x + 1, height - piece.y - DESCENT * piece.size)
    size = (max(piece.width - 2, 1), (ASCENT + DESCENT) * piece.size)
    patch = FancyBboxPatch(
        corner, *size, boxstyle="round,pad=0,rounding_size=5", facecolor=_unit(piece.fill), edgecolor=edge
    )
    figure.add_artist(patch).set(linewidth=line, linestyle=style, transform=IdentityTransform())


def _write(figure: Figure, piece: Piece, height: int) -> None:
    looks = dict(fontproperties=_properties(piece.size), color=_unit(piece.ink), va="baseline", ha="left")
    # Dollar signs in a text are no formulas, whatever the user's settings are.
    looks |= dict(parse_math=False, usetex=False, transform=IdentityTransform())
    figure.text(piece.x + PAD * (piece.fill is not None), height - piece.y, piece.text, **looks)


def _draw_legend(figure: Figure, legend: Legend, height: int) -> None:
    step, low, high = LEGEND_WIDTH / LEGEND_STEPS, legend.low, legend.high
    for index in range(LEGEND_STEPS):
        value = (low + (high - low) * index / (LEGEND_STEPS - 1)) / high
        corner = (legend.x + index * step, height - legend.y - DESCENT * SMALL)
        patch = Rectangle(
            corner, step, (ASCENT + DESCENT) * SMALL, facecolor=_unit(color(value)), linewidth=0
        )
        figure.add_artist(patch).set(transform=IdentityTransform(), antialiased=False)

"""Prints coloured text in a terminal."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.text import Text

from pyglobenc.common.characters import printable
from pyglobenc.viz.common import RAMPS, RGB, caption, color, ink, remainder, scale_of, top_units
from pyglobenc.viz.units import Scored, Unit

TOP = 8
BAR = 24
LEGEND_STEPS = 9


def show(
    attributions: Sequence[Scored], merge_words: bool | None = None, console: Console | None = None
) -> None:
    """Print every attribution: its caption, the coloured text, and a list of the largest scores.

    Args:
        attributions: attributions of one or more texts.
        merge_words: as for `Attribution.units`.
        console: console to print to; None for standard output.
    """
    console = console or Console(highlight=False)
    # A console that doesn't know its width says 0.
    console.width = console.width or 80
    for index, attribution in enumerate(attributions):
        if index:
            console.print()
        console.print(picture(attribution, merge_words, console.options.ascii_only))
        if console.color_system is not None:
            console.print(_legend(scale_of(attribution.units(merge_words))))


def picture(attribution: Scored, merge_words: bool | None = None, ascii_only: bool = False) -> RenderableType:
    """Return the picture of one attribution for rich to print.

    Args:
        attribution: the attribution of one text.
        merge_words: as for `Attribution.units`.
        ascii_only: the terminal can't show Unicode.
    """
    units = attribution.units(merge_words)
    scale = scale_of(units)
    return Group(
        _heading(attribution),
        Text(),
        _colored(attribution, units, scale),
        Text(),
        *_top(units, scale, ascii_only),
    )


def _hex(rgb: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _style(background: RGB, **more: bool) -> Style:
    # Both colours are set, so that the text looks the same on dark and on light terminals.
    return Style(color=_hex(ink(background)), bgcolor=_hex(background), **more)


def _heading(attribution: Scored) -> Text:
    out = Text()
    for index, (name, value) in enumerate(caption(attribution)):
        out.append("   " if index else "").append(f"{name} ", style="dim").append(value, style="bold")
    return out


def _colored(attribution: Scored, units: Sequence[Unit], scale: float) -> Text:
    out = Text()
    for unit in units:
        is_target = attribution.target_kind == "token" and attribution.target in unit.positions
        out.append(printable(unit.before, newlines=True))
        out.append(
            printable(unit.text),
            style=_style(color(unit.score / scale), italic=unit.special, underline=is_target),
        )
    return out.append(printable(remainder(attribution), newlines=True), style="dim strike")


def _top(units: Sequence[Unit], scale: float, ascii_only: bool) -> list[Text]:
    rows, full = [], "#" if ascii_only else "\u2588"
    for unit in top_units(units, TOP):
        length = round(abs(unit.score) / scale * BAR)
        bar = Text(full * length + " " * (BAR - length), style=_hex(RAMPS[unit.score >= 0][-2]))
        rows.append(Text(f"{unit.score:8.4f} ").append(bar).append(" " + printable(unit.text), style="none"))
    return rows


def _legend(scale: float) -> Text:
    out = Text().append(f"{0:8.4f} ")
    for step in range(LEGEND_STEPS):
        out.append("   ", style=_style(color(step / (LEGEND_STEPS - 1))))
    return out.append(f" {scale:.4f}   underlined: target, italic: special token", style="dim")

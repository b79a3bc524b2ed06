"""Draws coloured text as an HTML page that needs no network, script or font."""

from collections.abc import Sequence
from html import escape

from pyglobenc.common.characters import printable
from pyglobenc.viz.common import RGB, caption, check_columns, color, ink, remainder, scale_of, top_units
from pyglobenc.viz.units import Scored, Unit

TOP = 10
HEADING = "<h1>Token attribution</h1>"

STYLE = """
.globenc { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
.globenc h1 { font-size: 1.25rem; margin: .5rem 0 1rem; }
.globenc section { border: 1px solid #ddd; border-radius: .5rem; padding: 1rem 1.25rem; margin: 0 0 1.25rem; }
.globenc dl { display: flex; flex-wrap: wrap; gap: .1rem 1.5rem; margin: 0 0 1rem; font-size: .875rem; }
.globenc dl div { display: flex; gap: .4rem; }
.globenc dt { color: #666; white-space: nowrap; }
.globenc dd { margin: 0; font-weight: 600; }
.globenc img { max-width: 100%; }
.globenc .text { white-space: pre-wrap; line-height: 2; font-size: 1.125rem; margin: 0 0 1rem; }
.globenc .text span { padding: .15em .1em; border-radius: .2em; unicode-bidi: isolate; }
.globenc .text .special { font-size: .8em; border: 1px dashed #777; }
.globenc .text .target { outline: 2px solid #222; outline-offset: 1px; }
.globenc .text .cut { color: #666; text-decoration: line-through; }
.globenc .legend { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .6rem;
  font-size: .8rem; color: #555; margin: 0 0 1rem; }
.globenc .legend i { display: inline-block; width: 9rem; height: .9rem; border: 1px solid #ddd; }
.globenc table { border-collapse: collapse; font-size: .875rem; width: 100%; }
.globenc th { text-align: left; color: #666; font-weight: 400; }
.globenc td, .globenc th { padding: .1rem .75rem .1rem 0; }
.globenc .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 5rem; }
.globenc td b { display: block; height: .7rem; min-width: 1px;
  border: 1px solid #b0611c; box-sizing: border-box; }
.globenc td b.against { border-color: #08488c; }
.globenc summary { cursor: pointer; font-size: .875rem; color: #555; margin: .75rem 0 .25rem; }
.globenc:has(> .columns) { max-width: none; }
.globenc .columns { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 1rem; }
.globenc .columns section { margin: 0; padding: .75rem; }
.globenc .unit { width: 12rem; }
.globenc .columns .unit { width: 30%; }
.globenc .columns .number { width: 3.5rem; }
@media (max-width: 45rem) { .globenc .columns { grid-template-columns: minmax(0, 1fr); } }
"""


def page(attributions: Sequence[Scored], merge_words: bool | None = None, columns: int = 1) -> str:
    """Return a whole HTML page of one or more attributions.

    Args:
        attributions: attributions of one or more texts.
        merge_words: as for `Attribution.units`.
        columns: how many attributions stand side by side in a row.

    Raises:
        TypeError, ValueError: columns is no integer of at least 1.
    """
    return document(fragment(attributions, merge_words, columns, HEADING))


def document(body: str) -> str:
    """Return a whole HTML page with this body."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Token '
        f"attribution</title>\n</head>\n"
        f"<body>\n{body}</body>\n</html>\n"
    )


def fragment(
    attributions: Sequence[Scored], merge_words: bool | None = None, columns: int = 1, heading: str = ""
) -> str:
    """Return the part of a page that a notebook shows: the style, and a section for each attribution.

    Args:
        attributions, merge_words, columns: as for `page`.
        heading: HTML to put above the sections.
    """
    check_columns("html", columns)
    sections = "".join(_section(attribution, attribution.units(merge_words)) for attribution in attributions)
    if columns > 1:
        sections = f'<div class="columns" style="--columns:{columns}">\n{sections}</div>\n'
    return f'<style>{STYLE}</style>\n<div class="globenc">\n{heading}\n{sections}</div>\n'


def _section(attribution: Scored, units: Sequence[Unit]) -> str:
    scale = scale_of(units)
    parts = (
        _caption(attribution),
        _text(attribution, units, scale),
        _legend(units, scale),
        _tables(attribution, units, scale),
    )
    return f"<section>\n{''.join(parts)}</section>\n"


def _caption(attribution: Scored) -> str:
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in caption(attribution)
    )
    return f"<dl>{pairs}</dl>\n"


def _hex(rgb: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _text(attribution: Scored, units: Sequence[Unit], scale: float) -> str:
    spans = []
    for unit in units:
        background = color(unit.score / scale)
        names = ["special"] * unit.special + ["target"] * _is_target(attribution, unit)
        kind = f' class="{" ".join(names)}"' if names else ""
        style = f"background:{_hex(background)};color:{_hex(ink(background))}"
        span = (
            f'<span{kind} style="{style}" '
            f'title="{escape(_tooltip(attribution, unit))}">{escape(printable(unit.text))}</span>'
        )
        spans.append(escape(printable(unit.before, newlines=True)) + span)
    rest = remainder(attribution)
    cut = (
        f'<span class="cut" title="left out by truncation">{escape(printable(rest, newlines=True))}</span>'
        if rest
        else ""
    )
    return f'<p class="text" dir="auto">{"".join(spans)}{cut}</p>\n'


def _is_target(attribution: Scored, unit: Unit) -> bool:
    return attribution.target_kind == "token" and attribution.target in unit.positions


def _tooltip(attribution: Scored, unit: Unit) -> str:
    """Return the unit's score, and the name, position and score of each of its tokens."""
    pieces = [
        f"{printable(attribution.tokens[i])} at {i}: {attribution.scores[i]:.6g}" for i in unit.positions
    ]
    head = "special token" if unit.special else "word" if len(pieces) > 1 else "token"
    first = f"{head} {printable(unit.text)}: {unit.score:.6g}"
    return "\n".join([first, *pieces]) + ("\nthe target" if _is_target(attribution, unit) else "")


def _legend(units: Sequence[Unit], scale: float) -> str:
    low = -scale if any(unit.score < 0 for unit in units) else 0.0
    steps = [color((low + (scale - low) * k / 8) / scale) for k in range(9)]
    bar = f'<i style="background:linear-gradient(to right,{",".join(map(_hex, steps))})"></i>'
    marks = "framed: the target; dashed: special tokens, which may pass the end of the scale"
    return (
        f'<p class="legend"><span>{low:.4g}</span>{bar}<span>{scale:.4g}, the largest score of the '
        f"text</span><span>{marks}</span></p>\n"
    )


def _tables(attribution: Scored, units: Sequence[Unit], scale: float) -> str:
    top = "".join(_bar_row(unit, scale) for unit in top_units(units, TOP))
    rows = "".join(
        f'<tr><td class="number">{i}</td><td>{escape(printable(token))}</td><td '
        f'class="number">{score:.6g}</td></tr>\n'
        for i, (token, score) in enumerate(zip(attribution.tokens, attribution.scores.tolist(), strict=True))
    )
    head = '<tr><th class="number">position</th><th>token</th><th class="number">score</th></tr>\n'
    return (
        f"<table>{top}</table>\n<details><summary>All {len(attribution)} "
        f"tokens</summary><table>{head}{rows}</table></details>\n"
    )


def _bar_row(unit: Unit, scale: float) -> str:
    value = unit.score / scale
    kind = ' class="against"' if value < 0 else ""
    bar = f'<b{kind} style="width:{abs(value):.1%};background:{_hex(color(value))}"></b>'
    word = f'<td class="unit">{escape(printable(unit.text))}</td>'
    return f'<tr>{word}<td class="number">{unit.score:.4g}</td><td>{bar}</td></tr>\n'

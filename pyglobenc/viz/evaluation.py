"""Draws the rows of an evaluation: a table in the terminal, a PNG chart, and an HTML page."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pyglobenc.common.characters import printable

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]

# Okabe and Ito's colours, which people with any common colour blindness can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
# Methods beyond the number of colours get the next style.
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
# What changes along the curve of a metric, if it isn't the fraction that is removed.
ALONG = {
    "sanity": "parts with random weights, from the top",
    "token-f1": "words selected",
    "recovery": "fraction selected",
}
DPI, PANEL, BAR = 150, 5.0, 0.26  # of the chart: dots per inch, inches of a panel's width and of a bar
PANELS = 3  # side by side
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 0 auto; padding: 1rem; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: 0 0 1.5rem; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th { text-align: left; color: #555; font-weight: 400; }
td, th { padding: .15rem 1rem .15rem 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
dt { color: #555; float: left; clear: left; margin-right: .5rem; }
"""
# The last columns are the numbers of texts that are skipped, that have ties and whose scores are 0, and the
# seconds of an attribution. A terminal of 80 characters has room for them.
HEADS = ("method", "mean", "low", "high", "n", "skip", "tie", "zero", "s")


def split(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], dict[str, dict[str, dict[float, float]]]]:
    """Return the rows of each metric, and the curve of each method for each metric that has one.

    A row whose metric is "name.number" is a point of the curve called name, at that number.
    """
    scalars: dict[str, list[Row]] = {}
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        name, _, key = row["metric"].partition(".")
        place = _number(key)
        if place is None:
            scalars.setdefault(row["metric"], []).append(row)
        else:
            curves.setdefault(name, {}).setdefault(row["method"], {})[place] = row["mean"]
    return scalars, curves


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def cells(row: Row) -> list[str]:
    """Return the entries of a row under HEADS, as text."""
    numbers = [f"{row[name]:.3f}" for name in ("mean", "low", "high")]
    counts = [str(row.get(name, "")) for name in ("n", "skipped", "ties", "zeros")]
    return [printable(row["method"]), *numbers, *counts, f"{row['seconds_per_text']:.3f}"]


def show(rows: Sequence[Row], notes: Sequence[str], console: Console | None = None) -> None:
    """Print a table for each metric, without the points of curves, and the notes."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False)
    # A console that doesn't know its width says 0.
    console.width = console.width or 80
    for metric, of_metric in split(rows)[0].items():
        shape = dict(title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table = Table(title=printable(metric), **shape)
        for head in HEADS:
            table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
        for row in of_metric:
            table.add_row(*cells(row))
        console.print(table)
    for note in notes:
        console.print(printable(note), markup=False)


def png(rows: Sequence[Row]) -> bytes:
    """Return a chart: bars with 95 % intervals for each metric, and lines for each curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scalars, curves = split(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = [*curves, *scalars]
    wide = min(PANELS, len(panels))
    high = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(PANEL * wide, (1.6 + BAR * max(len(methods), 8)) * high), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(panels):
        axes = figure.add_subplot(high, wide, number + 1)
        if number < len(curves):
            _lines(axes, name, curves[name], methods)
        else:
            _bars(axes, name, scalars[name], methods)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _plain(text: str) -> str:
    # A dollar sign would start a formula.
    return printable(text).replace("$", r"\$")


def _lines(axes: Any, name: str, curves: dict[str, dict[float, float]], methods: Sequence[str]) -> None:
    for method, points in curves.items():
        number = methods.index(method)
        line, marker = LINES[number // len(COLORS) % len(LINES)]
        places = sorted(points)
        axes.plot(
            places,
            [points[place] for place in places],
            color=COLORS[number % len(COLORS)],
            linestyle=line,
            marker=marker,
            markersize=3,
            label=_plain(method),
        )
    axes.set(title=_plain(name), xlabel=ALONG.get(name, "fraction removed"), ylabel="mean")
    axes.legend(fontsize="xx-small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _bars(axes: Any, name: str, rows: Sequence[Row], methods: Sequence[str]) -> None:
    rows = sorted(rows, key=lambda row: -math.inf if math.isnan(row["mean"]) else row["mean"])
    places = range(len(rows))
    means = [row["mean"] for row in rows]
    # Without resamples there is no interval.
    errors = [
        [0 if math.isnan(row[end]) else abs(row["mean"] - row[end]) for row in rows]
        for end in ("low", "high")
    ]
    colors = [COLORS[methods.index(row["method"]) % len(COLORS)] for row in rows]
    axes.barh(places, means, xerr=errors, color=colors, error_kw={"elinewidth": 1})
    axes.set_yticks(places, [_plain(row["method"]) for row in rows], fontsize="small")
    axes.set(title=_plain(name), xlabel="mean with 95 % interval")


def page(rows: Sequence[Row], notes: Sequence[str], facts: Mapping[str, Any]) -> str:
    """Return an HTML page that needs no network: the chart, a table for each metric, notes and settings."""
    picture = base64.b64encode(png(rows)).decode()
    heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
    tables = []
    for metric, of_metric in split(rows)[0].items():
        body = ""
        for row in of_metric:
            first, *numbers = (escape(cell) for cell in cells(row))
            body += (
                f"<tr><td>{first}</td>" + "".join(f'<td class="number">{n}</td>' for n in numbers) + "</tr>\n"
            )
        caption = f"<caption>{escape(printable(metric))}</caption>"
        tables.append(f"<table>{caption}<tr>{heads}</tr>\n{body}</table>\n")
    said = "".join(f"<p>{escape(printable(note))}</p>\n" for note in notes)
    pairs = "".join(
        f"<dt>{escape(printable(name))}</dt><dd>{escape(printable(str(value)))}</dd>\n"
        for name, value in facts.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation of attributions</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        "<h1>Evaluation of attributions</h1>\n"
        f'<img alt="The means of all metrics, which the tables below list" '
        f'src="data:image/png;base64,{picture}">\n'
        f"{''.join(tables)}<h2>Notes</h2>\n{said}<h2>Settings</h2>\n<dl>{pairs}</dl>\n</body>\n</html>\n"
    )

"""Draws a map between tokens as a heat map with a colour bar, and the scores of every layer as curves."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text

from pyglobenc.common.characters import printable
from pyglobenc.viz.common import RAMPS

DPI = 120
# An odd number, so that 0 is exactly white between negative and positive values.
SHADES = 257
# Inches of a row or column with a name, and the smallest and largest side of a map.
CELL, LEAST, MOST = 0.22, 3.0, 16.0
# A longer name is cut.
LONGEST = 20
# Okabe and Ito's colours, which people with any common colour blindness can tell apart. With the markers,
# curves can also be told apart in grey.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"


def ramp(signed: bool) -> LinearSegmentedColormap:
    """Return the colours of the text pictures as a map of matplotlib; `signed` adds those of negative scores.

    The luminance falls evenly from 0 to the largest absolute value, so pictures are readable in grey.
    """
    colors = [*reversed(RAMPS[False][1:])] * signed + list(RAMPS[True])
    return LinearSegmentedColormap.from_list("scores", [np.array(rgb) / 255 for rgb in colors], SHADES)


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    axes_names: tuple[str, str] = ("receiving token", "contributing token"),
) -> bytes:
    """Draw a map between tokens as a PNG file with a colour bar.

    Args:
        values: (rows, columns), finite. White is 0; negative values are blue. The largest absolute value has
            the full colour.
        rows, columns: the names of the rows and columns.
        title: the text above the map.
        axes_names: what the rows and the columns are.

    Raises:
        ValueError: values doesn't have a row and a column for each name, is empty, or isn't finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(rows), len(columns)) or not values.size:
        raise ValueError(
            f"heat_map: values must be ({len(rows)}, {len(columns)}) for the names, and not empty; got "
            f"{values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError("heat_map: values must be finite")
    high = np.abs(values).max() or 1.0
    signed = bool(values.min() < 0)
    sides = [min(max(CELL * len(names), LEAST), MOST) for names in (columns, rows)]
    figure = Figure(figsize=(sides[0] + 3, sides[1] + 2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(
        values, cmap=ramp(signed), vmin=-high if signed else 0, vmax=high, interpolation="nearest"
    )
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_formatter(tick_text)
    for axis, names, side in ((axes.xaxis, columns, sides[0]), (axes.yaxis, rows, sides[1])):
        # Where there is no room for every name, evenly spaced ones are shown.
        step = max(1, round(CELL * len(names) / side))
        axis.set_ticks(range(0, len(names), step), [_name(name) for name in names[::step]], fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set_ylabel(printable(axes_names[0]), fontsize=8)
    axes.set_xlabel(printable(axes_names[1]), fontsize=8)
    return _written(figure, axes, title)


def layer_curves(values: np.ndarray, names: Sequence[str], title: str = "", label: str = "score") -> bytes:
    """Draw the scores of tokens along the layers as a PNG file.

    The tokens with the largest absolute score in any layer have coloured curves, the others grey ones.

    Args:
        values: (layers, n), finite.
        names: the n tokens.
        title: the text above the curves.
        label: what the scores are.

    Raises:
        ValueError: values isn't (layers, n), is empty, or isn't finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(names) or not values.size:
        raise ValueError(
            f"layer_curves: values must be (layers, {len(names)}) for the names, and not empty; got "
            f"{values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError("layer_curves: values must be finite")
    figure = Figure(figsize=(8, 4.5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    largest = np.argsort(-np.abs(values).max(0), kind="stable")
    for index in largest[len(COLORS) :]:
        axes.plot(values[:, index], color="#cccccc", linewidth=0.8, zorder=1)
    for number, index in enumerate(largest[: len(COLORS)]):
        axes.plot(
            values[:, index],
            color=COLORS[number],
            marker=MARKERS[number],
            markersize=5,
            label=f"{_name(names[index])} ({index})",
        )
    axes.set_xticks(range(len(values)), map(str, range(len(values))))
    axes.set_xlabel("layer", fontsize=9)
    axes.yaxis.set_major_formatter(tick_text)
    axes.set_ylabel(printable(label), fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, title="token", title_fontsize=8)
    return _written(figure, axes, title)


def tick_text(value: float, position: int | None = None) -> str:
    """Return the text of a tick; matplotlib's own formatter writes formulas if the user's settings say so."""
    return f"{value:.4g}"


def _name(text: str) -> str:
    text = printable(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _written(figure: Figure, axes: Axes, title: str) -> bytes:
    axes.set_title(printable(title), fontsize=9)
    # The texts of ticks are made when they are asked for.
    axes.get_xticklabels(), axes.get_yticklabels()
    for text in figure.findobj(Text):
        # Dollar signs in a token are no formulas, whatever the user's settings are.
        text.set(parse_math=False, usetex=False)
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()

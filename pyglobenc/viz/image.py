"""Draws scores of patches or pixels over an image.

The scores are interpolated bilinearly. Their colours, which are those of the text pictures, tint the image in
grey, and a colour bar gives their values.
"""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pyglobenc.common.characters import printable
from pyglobenc.viz.plots import ramp, tick_text

DPI = 100
INCHES = 3.0  # side of one picture
# Luma of red, green and blue (ITU-R BT.601).
GREY = np.array([0.299, 0.587, 0.114])
# matplotlib's Agg renderer draws fewer than 2**16 pixels per side.
TALLEST = 30_000


def upscale(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """Interpolate scores on a grid (rows, columns) to every pixel, (height, width).

    The interpolation is bilinear between the centres of the cells, and constant beyond the outermost centres.
    """
    rows, columns = (_places(count, size) for count, size in zip(scores.shape, (height, width), strict=True))
    return rows @ scores @ columns.T


def _places(count: int, size: int) -> np.ndarray:
    """Return the weights (size, count) of the cells at every pixel along one axis."""
    place = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    low = np.minimum(place.astype(int), max(count - 2, 0))
    weights = np.zeros((size, count))
    weights[np.arange(size), low] = 1 - (place - low)
    if count > 1:
        weights[np.arange(size), low + 1] = place - low
    return weights


def to_unit(values: np.ndarray) -> np.ndarray:
    """Return an array of the same shape, scaled linearly to [0, 1]; it is 0 if all values are equal."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def overlay(image: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ScalarMappable]:
    """Draw a heat map over an image.

    Args:
        image: (height, width, 3) in [0, 1].
        values: (height, width).

    Returns:
        (height, width, 3) uint8, the image in pale grey, tinted; and the scale of the colours for a colour
        bar. It reaches from the smallest to the largest value. If a value is negative, it is symmetric, and
        negative values are blue.
    """
    high, signed = float(np.abs(values).max()), bool(values.min() < 0)
    low = -high if signed else float(values.min())
    scale = ScalarMappable(Normalize(low, high), ramp(signed))
    grey = image @ GREY
    # Only the lightest greys are used, so that the tint stands out more than the image.
    mixed = (0.7 + 0.3 * grey[..., None]) * scale.to_rgba(values)[..., :3]
    return np.round(255 * mixed).astype(np.uint8), scale


def to_png(rows: Sequence[tuple[np.ndarray, Sequence[tuple[str, np.ndarray]]]]) -> bytes:
    """Draw rows of pictures as a PNG file.

    Args:
        rows: for each row an image (height, width, 3) in [0, 1], and the name and the scores (height, width)
            of each overlay.

    Raises:
        ValueError: there are too many rows for one picture.
    """
    pictures = [
        [("input", image, None), *((printable(name), *overlay(image, values)) for name, values in heats)]
        for image, heats in rows
    ]
    columns = max(map(len, pictures))
    height = (INCHES + 0.3) * len(pictures)
    if height * DPI > TALLEST:
        raise ValueError(
            f"png: {len(pictures)} images need a picture more than {TALLEST} pixels high; write one for each"
        )
    figure = Figure(figsize=(INCHES * columns, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(pictures), columns, squeeze=False)
    for cells, row in zip(grid, pictures, strict=True):
        for axes in cells:
            axes.set_axis_off()
        for axes, (name, picture, scale) in zip(cells, row, strict=False):
            axes.imshow(picture, interpolation="nearest")
            if scale is not None:
                bar = figure.colorbar(scale, ax=axes, shrink=0.7)
                bar.ax.tick_params(labelsize=7)
                bar.ax.yaxis.set_major_formatter(tick_text)
            # Dollar signs in a label are no formulas, whatever the user's settings are.
            axes.set_title(name, fontsize=9, parse_math=False, usetex=False)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()

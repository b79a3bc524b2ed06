"""Scores of patches or pixels laid over the image, as the published notebooks show them: bilinear, jet
colours, added to the image.
"""

from collections.abc import Sequence
from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyglobenc.common.characters import printable

DPI = 100
INCHES = 3.0  # side of one picture
# Agg draws less than 2**16 pixels a side
TALLEST = 30_000


def upscale(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scores on a grid (rows, columns) at every pixel, (height, width), bilinear between the centres of the
    cells, flat beyond them.
    """
    rows, columns = (_places(count, size) for count, size in zip(scores.shape, (height, width), strict=True))
    return rows @ scores @ columns.T


def _places(count: int, size: int) -> np.ndarray:
    """Weights (size, count) of the cells at every pixel."""
    place = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    low = np.minimum(place.astype(int), max(count - 2, 0))
    weights = np.zeros((size, count))
    weights[np.arange(size), low] = 1 - (place - low)
    if count > 1:
        weights[np.arange(size), low + 1] = place - low
    return weights


def to_unit(values: np.ndarray) -> np.ndarray:
    """Values moved to [0, 1]; 0 where they are all the same."""
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Heat over an image.

    Args:
        image: (height, width, 3), in [0, 1].
        heat: (height, width), in [0, 1].

    Returns:
        (height, width, 3) uint8: colours of the heat added to the image, scaled to its largest value.
    """
    mixed = matplotlib.colormaps["jet"](heat)[..., :3] + image
    return np.round(255 * mixed / mixed.max()).astype(np.uint8)


def to_png(rows: Sequence[tuple[np.ndarray, Sequence[tuple[str, np.ndarray]]]]) -> bytes:
    """Draw rows of pictures as a PNG file: an image, and the overlay of each heat (height, width) in [0, 1]
    under its name.
    """
    pictures = [
        [("input", image), *((printable(name), overlay(image, heat)) for name, heat in heats)]
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
        for axes, (name, picture) in zip(cells, row, strict=False):
            axes.imshow(picture, interpolation="nearest")
            # a label's dollar signs are no formulas, whatever the user's settings
            axes.set_title(name, fontsize=9, parse_math=False, usetex=False)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()

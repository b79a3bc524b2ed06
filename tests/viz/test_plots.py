"""Heat maps and curves: their colours, names, limits, and that text stays text."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from pyglobenc.viz.common import contrast
from pyglobenc.viz.plots import COLORS, heat_map, layer_curves, ramp

NAMES = ["[CLS]", "$x$", "\\frac{$", "<b>", "\x1b[31m"]


def pixels(png):
    return np.round(imread(io.BytesIO(png), format="png")[..., :3] * 255).astype(int)


def cells(image, rgb):
    """The number of pixels of a colour; matplotlib may take the next one of its colours."""
    return int((abs(image - np.array(rgb)) <= 2).all(-1).sum())


def shade(colors, place):
    return tuple(round(255 * channel) for channel in colors(place)[:3])


def test_heat_map_has_a_cell_for_every_value():
    values = np.zeros((5, 5))
    values[1, 2], values[3, 0] = 4.0, 2.0
    image = pixels(heat_map(values, NAMES, NAMES, "a title"))
    full, half = (cells(image, shade(ramp(False), place)) for place in (1.0, 0.5))
    assert full > 1000 and abs(half - full) < 0.3 * full, "the colour bar adds a little to each"
    assert cells(image, (8, 72, 140)) == 0, "without negative values nothing is blue"
    values[3, 0] = -4.0
    assert cells(pixels(heat_map(values, NAMES, NAMES)), (8, 72, 140)) > 1000


def test_heat_maps_are_readable_in_grey():
    for places in (np.linspace(0, 1, 101), np.linspace(0.5, 1, 51), np.linspace(0.5, 0, 51)):
        colors = ramp(signed=len(places) == 51)
        luminance = [contrast(shade(colors, place), (0, 0, 0)) for place in places]
        assert all(a > b for a, b in zip(luminance, luminance[2:], strict=False))


def test_plots_take_any_name_and_any_settings_of_the_user():
    import matplotlib

    plain = heat_map(np.eye(5), NAMES, NAMES, "$"), layer_curves(np.eye(5), NAMES, "$")
    with matplotlib.rc_context({"text.usetex": True}):
        assert heat_map(np.eye(5), NAMES, NAMES, "$") == plain[0]
        assert layer_curves(np.eye(5), NAMES, "$") == plain[1]


def test_long_texts_have_fewer_names_and_bounded_pictures():
    names = ["token"] * 700
    image = pixels(heat_map(np.eye(700), names, names))
    assert max(image.shape) < 3000
    assert pixels(heat_map(np.ones((1, 1)), ["a" * 500], ["b"])).shape[1] < 1000


def test_curves_show_the_largest_tokens_in_color():
    values = np.zeros((4, 9))
    values[2] = -np.arange(9)
    image = pixels(layer_curves(values, [str(index) for index in range(9)]))
    for number, color in enumerate(COLORS):
        rgb = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
        assert cells(image, rgb) > 200, number
    assert cells(image, (0xCC, 0xCC, 0xCC)) > 100


@pytest.mark.parametrize("draw", [lambda values: heat_map(values, ["a"], ["a", "b"]),
                                  lambda values: layer_curves(values, ["a", "b"])])  # fmt: skip
def test_plots_refuse_what_they_cant_show(draw):
    for values in (np.ones((1, 3)), np.ones(2), np.ones((0, 2))):
        with pytest.raises(ValueError, match="for the names, and not empty; got"):
            draw(values)
    with pytest.raises(ValueError, match="values must be finite"):
        draw(np.array([[1.0, np.nan]]))

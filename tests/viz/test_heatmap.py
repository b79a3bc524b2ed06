"""Heat maps of generated tokens in the terminal, as HTML and as PNG."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from pyglobenc.viz import heatmap
from pyglobenc.viz.common import color
from pyglobenc.viz.heatmap import Heat

ESCAPES = "\x1b[31m \x07 \u202e \x00"


def heat(count=2, width=5, **changes):
    """Return a table with names, unless other ones are given."""
    values = np.linspace(-1, 2, count * width).reshape(count, width) * 10.0 ** (np.arange(count) % 3)[:, None]
    out = dict(
        caption=[("method", "saliency")],
        rows=[f"r{i}" for i in range(count)],
        columns=[f"c{i}" for i in range(width)],
        values=values,
        notes=[f"{10 * i}%" for i in range(count)],
        special=[True] + [False] * (width - 1),
        border=width - count,
    )
    return Heat(**(out | changes))


class Cells(HTMLParser):
    """Collects the background and the title of every cell, all text, and the names of all tags."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.texts, self.tags = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        if tag == "td" and "title" in attrs:
            self.cells.append((attrs["style"].removeprefix("background:"), attrs["title"]))

    def handle_data(self, data):
        self.texts.append(data)


def in_color(picture, width=80):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=width, highlight=False)
    heatmap.show(picture, console)
    return out.getvalue()


def test_colors_are_scaled_by_each_row_without_special_tokens():
    picture = heat()
    page = Cells(heatmap.page(picture))
    ordinary = picture.values[:, 1:]
    exact = picture.values / np.abs(ordinary).max(1, keepdims=True)
    expected = ["#{:02x}{:02x}{:02x}".format(*color(value)) for value in exact.flatten()]
    assert [background for background, _ in page.cells] == expected
    assert page.cells[6][1] == f"c1: {picture.values[1, 1]:.4g}"
    assert {"r0", "10%", "c4", "saliency"} <= set(page.texts)
    zeros = Cells(heatmap.page(heat(values=np.zeros((2, 5)))))
    assert {background for background, _ in zeros.cells} == {"#ffffff"}


def test_markup_and_controls_in_names_stay_text():
    names = ["<b>&amp;</b>", f"a{ESCAPES}b", "[red]x[/red]", '"quoted"', "$x^2$"]
    picture = heat(
        columns=names, rows=[names[0], names[2]], caption=[("model", "<script>")], notes=["<i>", "[b]"]
    )
    page = heatmap.page(picture)
    cells = Cells(page)
    assert not {"b", "i", "script"} & cells.tags and names[0] in cells.texts and names[2] in cells.texts
    assert cells.cells[0][1].startswith("<b>&amp;</b>: ") and cells.cells[3][1].startswith('"quoted": ')
    shown = in_color(picture)
    assert "[red]x[/red]" in shown and "<script>" in shown and not re.search("[\x00\x07\u202e]", page + shown)
    assert heatmap.png(picture).startswith(b"\x89PNG")


def test_the_terminal_shows_cells_and_the_largest_sources():
    picture = heat(2, 5)
    shown = in_color(picture)
    assert "the first 3 are the prompt" in shown
    # Cells of three spaces, since there is room: one for each column, and a background of its own.
    assert len(re.findall(r"48;2;\d+;\d+;\d+m {3}\x1b", shown)) == 10
    assert re.search(r"r1 +10%.* {2}c4 20, c3 17, c2 13", re.sub(r"\x1b\[[0-9;]*m", "", shown))
    wide = heat(2, 1000)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", in_color(wide)).splitlines()
    assert all(len(line) <= 80 for line in lines)
    plain = Console(file=io.StringIO(), width=80, highlight=False)
    heatmap.show(picture, plain)
    assert plain.file.getvalue().splitlines()[1].split() == [
        "r0",
        "0%",
        "c1",
        "-0.67,",
        "c2",
        "-0.33,",
        "c4",
        "0.33",
    ]


def test_a_wide_table_shows_its_strongest_columns(monkeypatch):
    picture = heat(2, 1000, special=[False] * 1000)
    picture.shades[:] = 0
    picture.shades[1, [7, 500, 999]] = 0.1, -0.2, 0.3
    assert picture.strongest(3) == [7, 500, 999]
    page = heatmap.page(picture)
    assert "The 600 columns with the smallest scores are left out" in page
    assert len(Cells(page).cells) == 2 * heatmap.PAGE_COLUMNS
    many = heat(500, 600)
    assert len(Cells(heatmap.page(many)).cells) <= heatmap.PAGE_CELLS
    monkeypatch.setattr(heatmap, "TALLEST", 500)
    with pytest.raises(ValueError, match="500 rows need a picture more than 500 pixels high; write HTML"):
        heatmap.png(many)


def test_the_picture_has_the_colors_of_the_scores():
    picture = heat()
    pixels = np.round(imread(io.BytesIO(heatmap.png(picture)))[..., :3] * 255).astype(int).reshape(-1, 3)
    found = {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}
    assert {color(float(shade)) for shade in picture.shades.flatten()} <= found


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (3, 0)])
def test_small_tables(shape):
    rows, columns = shape
    names = [f"c{i}" for i in range(columns)]
    picture = heat(rows, columns, values=np.zeros(shape), columns=names, special=None, border=None)
    assert heatmap.page(picture) and in_color(picture)
    if rows * columns:
        assert heatmap.png(picture)
    else:
        with pytest.raises(ValueError, match="the table has no cells"):
            heatmap.png(picture)

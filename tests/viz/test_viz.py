import io
import logging
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from pyglobenc.common.characters import printable
from pyglobenc.results import Attribution, Attributions
from pyglobenc.viz import html, png, terminal
from pyglobenc.viz.common import RAMPS, color, contrast, ink, scale_of

ESCAPES = "\x1b[31m \x07 \u202e \x00"


def attribution(words, scores=None, **changes):
    text = " ".join(words)
    starts = np.cumsum([0] + [len(word) + 1 for word in words])[:-1].tolist()
    n = len(words) + 1
    out = dict(
        text=text,
        tokens=["[CLS]", *words],
        token_ids=list(range(n)),
        special=[True] + [False] * len(words),
        scores=np.linspace(0.1, 1, n) if scores is None else np.array(scores, dtype=np.float64),
        method="globenc",
        model="tiny",
        target=0,
        target_name="[CLS]",
        word_ids=[None, *range(len(words))],
        offsets=[(0, 0)] + [(start, start + len(word)) for start, word in zip(starts, words, strict=True)],
    )
    return Attribution(**(out | changes))


def in_color(attributions, **changes):
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        width=80,
        highlight=False,
        legacy_windows=False,
    )
    terminal.show(attributions, console=console, **changes)
    return console.file.getvalue()


def plain(attributions, encoding="utf-8"):
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=80, highlight=False)
    terminal.show(attributions, console=console)
    console.file.flush()
    return console.file.buffer.getvalue().decode(encoding)


class Page(HTMLParser):
    """The texts and attributes of a page's elements, by class."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.spans, self.tags, self.words = [], [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link"):
            self.stack.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        kind = self.stack[-1][1].get("class", "") if self.stack else ""
        if any(attrs.get("class") == "text" for _, attrs in self.stack):
            self.words["text"] = self.words.get("text", "") + data
            if self.stack[-1][0] == "span":
                self.spans.append((data, kind, self.stack[-1][1]))


def test_colors_darken_evenly_and_their_ink_is_readable():
    values = np.linspace(0, 1, 101)
    for sign in (1, -1):
        luminance = [contrast(color(sign * value), (0, 0, 0)) for value in values]
        assert all(a > b for a, b in zip(luminance, luminance[1:], strict=False))
        # WCAG 2.2, level AA, requires this contrast.
        assert min(contrast(ink(color(sign * value)), color(sign * value)) for value in values) >= 4.5
    assert (
        color(0.0) == (255, 255, 255)
        and color(7.0) == color(1.0) == RAMPS[True][-1]
        and color(-7.0) == RAMPS[False][-1]
    )


def test_colors_for_and_against_differ_for_colour_blind_eyes():
    # Deuteranopia and protanopia in linear RGB merge red and green and keep blue (Vienot et al. 1999).
    for weights in ((0.29275, 0.70725), (0.11238, 0.88762)):
        for value in (0.5, 1.0):
            seen = []
            for rgb in (color(value), color(-value)):
                r, g, b = ((c / 255) ** 2.2 for c in rgb)
                seen.append((weights[0] * r + weights[1] * g, b))
            assert abs(seen[0][1] - seen[1][1]) > 0.25


def test_scale_leaves_special_tokens_out():
    a = attribution(["a", "b"], [9, -2, 1])
    assert scale_of(a.units()) == 2 and scale_of(a.units()[:1]) == 9
    assert scale_of(attribution(["a"], [0, 0]).units()) == 1


def test_printable_keeps_scripts_and_drops_what_steers():
    assert (
        printable("a\u00e9\u4e2d\U0001f469\u200d\U0001f467 \u0644\u200c")
        == "a\u00e9\u4e2d\U0001f469\u200d\U0001f467 \u0644\u200c"
    )
    assert printable("a\tb\u00a0c\nd") == "a b c d" and printable("a\nb", newlines=True) == "a\nb"
    assert printable(ESCAPES) == "\ufffd[31m \ufffd \ufffd \ufffd"


def test_html_shows_the_text_and_nothing_in_it_is_markup():
    words = [
        "<script>alert(1)</script>",
        '"quoted"',
        "&amp;",
        "\u4e2d\u6587",
        "\U0001f389",
        "\u0645\u0631\u062d\u0628\u0627",
    ]
    page = attribution(words, label="<b>", probability=0.25, model="a<b").to_html()
    parsed = Page(page)
    assert parsed.words["text"] == "[CLS] " + " ".join(words) and not parsed.stack
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "&lt;b&gt;" in page and "25.0%" in page and "a&lt;b" in page


def test_html_needs_nothing_from_elsewhere():
    page = attribution(["a", "b"]).to_html()
    assert not re.search(r"https?:|src=|@import|url\(|<link|<script", page)
    assert page.startswith("<!DOCTYPE html>") and '<meta charset="utf-8">' in page


def test_html_numbers_colors_and_marks():
    a = attribution(["low", "top", "mid", "minus"], [5.0, 0.0, 0.8, 0.4, -0.2], target=3)
    spans = {text: (kind, attrs) for text, kind, attrs in Page(a.to_html()).spans}
    assert "background:#a64805" in spans["top"][1]["style"] and "color:#ffffff" in spans["top"][1]["style"]
    assert "background:#ffffff" in spans["low"][1]["style"] and "color:#000000" in spans["low"][1]["style"]
    assert spans["[CLS]"][0] == "special" and spans["mid"][0] == "target" and spans["top"][0] == ""
    assert (
        "0.8" in spans["top"][1]["title"]
        and "-0.2" in spans["minus"][1]["title"]
        and "the target" in spans["mid"][1]["title"]
    )
    assert "-0.8" in a.to_html(), "the legend reaches to minus the largest score"


def test_html_of_words_lists_their_pieces():
    a = attribution(
        ["token", "##ize"],
        [0, 1.0, 0.5],
        text="tokenize",
        offsets=[(0, 0), (0, 5), (5, 8)],
        word_ids=[None, 0, 0],
    )
    spans = {text: attrs for text, _, attrs in Page(a.to_html(merge_words=True)).spans}
    assert spans["tokenize"]["title"] == "word tokenize: 1.5\ntoken at 1: 1\n##ize at 2: 0.5"
    assert "token" in {text for text, _, _ in Page(a.to_html()).spans}


@pytest.mark.parametrize("kind, expected", [("token", "target"), ("class", "target class")])
def test_captions_say_what_was_done(kind, expected):
    a = attribution(
        ["a", "b"], target_kind=kind, target_name="GOOD", target=1, windows=[(1, 2), (2, 3)], method="n-res"
    )
    for picture in (a.to_html(), plain([a])):
        for words in (expected, "GOOD (1)", "n-res", "tiny", "2 overlapping"):
            assert words in picture
    assert ("framed" in a.to_html()) and (' class="target"' in a.to_html()) == (kind == "token")


def test_what_truncation_left_out_is_shown_as_left_out():
    a = attribution(["a", "b"], text="a b and the rest", cut=3)
    assert '<span class="cut" title="left out by truncation"> and the rest</span>' in a.to_html()
    assert (
        "the last 3 tokens" in a.to_html()
        and "and the rest" in plain([a])
        and "the last 3 tokens" in plain([a])
    )
    assert a.to_png() != attribution(["a", "b"]).to_png()


def test_controls_reach_neither_terminal_nor_page():
    a = attribution(["a" + ESCAPES, "b"], model=ESCAPES, method="m\x1b")
    for picture in (plain([a]), a.to_html(), re.sub(r"\x1b\[[\d;]*m", "", in_color([a]))):
        assert not set(picture) & set("\x1b\x07\u202e\x00")


def test_terminal_colors_both_ink_and_background():
    out = in_color([attribution(["low", "top"], [0, 0.0, 2.0])])
    assert "\x1b[38;2;255;255;255;48;2;166;72;5mtop" in out and "\x1b[38;2;0;0;0;48;2;255;255;255mlow" in out
    assert "\x1b[3;4;" in out, "the special token that is the target is italic and underlined"


def test_terminal_without_colors_has_the_numbers():
    out = plain([attribution(["low", "top"], [0, 0.25, 2.0]), attribution(["other"])])
    assert "\x1b" not in out and "[CLS] low top" in out and "other" in out
    assert re.search(r"2\.0000 \u2588{24} top\n +0\.2500 \u2588{3} +low", out)
    assert "\u2588" not in plain([attribution(["a"])], "ascii") and "#" in plain(
        [attribution(["a"])], "ascii"
    )


def test_a_terminal_that_says_nothing_of_its_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "0")
    attribution(["low", "top"]).show()
    assert "[CLS] low top" in capsys.readouterr().out


def test_rich_markup_in_a_text_is_text():
    assert "[bold]x[/bold] [/]" in plain([attribution(["[bold]x[/bold]", "[/]"], model="[red]")])


def pixels(picture):
    return (imread(io.BytesIO(picture), format="png")[..., :3] * 255).round().astype(int)


def has_color(image, rgb, count):
    return (image == np.array(rgb)).all(-1).sum() >= count


def test_png_shows_the_colors_of_the_scores(caplog):
    picture = attribution(["low", "top", "minus"], [0, 0.1, 1.0, -0.5]).to_png()
    image = pixels(picture)
    assert picture.startswith(b"\x89PNG") and image.shape[1] == png.WIDTH
    for rgb in (color(1.0), color(-0.5), color(0.1)):
        assert has_color(image, rgb, 500)
    assert not has_color(pixels(attribution(["a", "b", "c"], [0, 0.1, 1, 0.1]).to_png()), color(-0.5), 1)
    assert not caplog.records


def test_png_frames_the_target():
    words = ["a", "b"]
    framed, other = (pixels(attribution(words, [0, 1, 0.5], target=target).to_png()) for target in (2, 1))
    assert framed.shape == other.shape and (framed != other).any()


def test_png_wraps_long_words_and_long_texts():
    one = pixels(attribution(["w"]).to_png())
    long = pixels(attribution(["w" * 200]).to_png())
    many = pixels(attribution(["word"] * 120).to_png())
    assert long.shape[0] > one.shape[0] and many.shape[0] > long.shape[0]
    for image in (long, many):
        margin = image[:, -png.MARGIN // 2 :]
        assert (margin == 255).all(), "nothing runs off the page"


def test_png_takes_formulas_and_settings_of_the_user_as_they_are(recwarn):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "savefig.dpi": 10, "savefig.bbox": "tight"}):
        odd = pixels(attribution(["$\\frac{$", "$x$", "100%", "_^"]).to_png())
    assert odd.shape[1] == png.WIDTH and not [w for w in recwarn if "Glyph" in str(w.message)]


def test_png_says_which_characters_no_font_has(caplog, monkeypatch):
    monkeypatch.setattr(png, "_fonts", lambda: ["DejaVu Sans"])
    with caplog.at_level(logging.WARNING, logger="pyglobenc"):
        attribution(["a", "\U000130b8", "\U00012000b"]).to_png()
    assert "no font here has \U00012000\U000130b8" in caplog.text and len(caplog.records) == 1


def test_png_refuses_more_than_can_be_drawn(monkeypatch):
    monkeypatch.setattr(png, "TALLEST", 300)
    with pytest.raises(
        ValueError, match="png: the text needs a picture more than 300 pixels high; write HTML instead"
    ):
        attribution(["word"] * 100).to_png()


@pytest.mark.parametrize("word", ["abcdefghij", "a\u0301", "iiiiW", "\u4e2d", "\u0301\u200d"])
def test_png_measures_a_long_word_in_linear_time(monkeypatch, word):
    measured, renderer = [], png._renderer()
    size = renderer.get_text_width_height_descent

    def counted(text, *rest, **more):
        measured.append(len(text))
        return size(text, *rest, **more)

    monkeypatch.setattr(renderer, "get_text_width_height_descent", counted)
    png._width.cache_clear()
    text = word * 400
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = list(png._split(text, png.SIZE))
        assert "".join(parts) == text and all(png._width(part, png.SIZE) <= png.ROOM for part in parts)
    # Every character is measured once alone, once with its line, and once more if the line is cut again.
    assert sum(measured) <= 3 * len(text)


def test_png_refuses_a_long_text_before_it_is_laid_out(monkeypatch):
    monkeypatch.setattr(png, "_lay_out", None)
    for words in (["abcdefghij" * 10_000], ["word"] * 50_000):
        with pytest.raises(ValueError, match="more than 30000 pixels high"):
            attribution(words).to_png()


def test_pictures_of_several_texts_hold_all():
    several = Attributions([attribution(["first"]), attribution(["second"], model="other")])
    assert html.page(several).count("<section>") == 2 and "second" in plain(several)
    assert pixels(several.to_png()).shape[0] > pixels(several[0].to_png()).shape[0]
    assert several._repr_html_().count("<section>") == 2 and "<html" not in several[0]._repr_html_()


def test_several_methods_stand_side_by_side():
    three = Attributions(attribution(["a", "deep"], method=name) for name in ("globenc", "n", "w"))
    page = three.to_html(columns=3)
    assert '<div class="columns" style="--columns:3">' in page and page.count("<section>") == 3
    assert not Page(page).stack and 'class="columns"' not in three.to_html()
    below, beside, rows = (pixels(three.to_png(columns=count)) for count in (1, 3, 2))
    assert beside.shape[1] == 3 * png.COLUMN and beside.shape[0] < below.shape[0]
    assert rows.shape[1] == 2 * png.COLUMN and beside.shape[0] < rows.shape[0] < below.shape[0]
    # Each column holds the colour of the largest score.
    for left in range(0, 3 * png.COLUMN, png.COLUMN):
        column = beside[:, left : left + png.COLUMN]
        assert has_color(column, color(1.0), 500) and (column[:, : png.MARGIN // 2] == 255).all()
    assert pixels(Attributions(three[:1]).to_png(columns=4)).shape[1] == png.WIDTH


@pytest.mark.parametrize("columns, error", [(0, ValueError), (True, TypeError), (1.5, TypeError)])
def test_columns_are_counted(columns, error):
    several = Attributions([attribution(["a"])])
    for draw in (several.to_html, several.to_png):
        with pytest.raises(error, match="columns must be"):
            draw(columns=columns)


def test_png_refuses_more_columns_than_can_be_drawn():
    with pytest.raises(ValueError, match="31 columns need a picture more than 30000 pixels wide"):
        Attributions([attribution(["a"])] * 31).to_png(columns=31)


def test_pictures_are_the_same_each_time():
    a = attribution(["a", "b", "c"])
    assert a.to_png() == a.to_png() and a.to_html() == a.to_html()

"""The table's numbers and files."""

import csv
import json

import numpy as np
import pytest
from scipy.stats import bootstrap

from pyglobenc.evaluate import EvaluationTable
from pyglobenc.evaluate import table as module
from pyglobenc.evaluate.table import bootstrap_interval

NASTY = "<b>&$x^2$\x1b[31m"


@pytest.fixture
def table():
    values = np.array([0.5, np.nan, 0.25, 1 / 3])
    per_text = {
        ("globenc", "sufficiency"): values,
        ("globenc", "curve"): values,
        ("globenc", "curve.0"): values,
        ("globenc", "curve.0.5"): values / 2,
        (NASTY, "sufficiency"): np.full(4, np.nan),
    }
    about = {"seconds_per_text": 0.5, "ties": 1, "zeros": 0}
    notes, info = [f"A note on {NASTY}."], {"model": NASTY}
    return EvaluationTable(per_text, {"globenc": about, NASTY: about}, 500, 0, notes, info)


def test_rows_count_the_texts_that_are_left_out(table):
    row = table.rows[0]
    assert (row["n"], row["skipped"], row["ties"], row["seconds_per_text"]) == (3, 1, 1, 0.5)
    assert row["mean"] == np.mean([0.5, 0.25, 1 / 3]) and row["low"] < row["mean"] < row["high"]
    empty = table.rows[-1]
    assert (empty["n"], empty["skipped"]) == (0, 4) and np.isnan(empty["mean"])


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(7).normal(size=80)
    low, high = bootstrap_interval(values, 4000, 0)
    other = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    # Both ends are quantiles of 4,000 resampled means. Their standard errors are below a tenth of the
    # means' own standard error.
    error = values.std() / np.sqrt(len(values))
    assert abs(low - other.low) < 0.4 * error and abs(high - other.high) < 0.4 * error
    assert bootstrap_interval(values, 4000, 0) == (low, high)
    assert np.isnan(bootstrap_interval(values, 0, 0)).all()
    assert bootstrap_interval(values[:1], 50, 0) == (values[0], values[0])


def test_resamples_in_blocks_are_the_same(monkeypatch):
    values = np.arange(10.0)
    whole = bootstrap_interval(values, 100, 3)
    monkeypatch.setattr(module, "RESAMPLED", 70)
    assert bootstrap_interval(values, 100, 3) == whole


def test_csv_keeps_every_digit(table, tmp_path):
    table.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [row["method"] for row in table.rows]
    assert all(float(row["mean"]) == own["mean"] for row, own in zip(rows[:-1], table.rows[:-1], strict=True))
    assert list(rows[0])[:7] == ["method", "metric", "mean", "low", "high", "n", "seconds_per_text"]


def test_json_holds_no_nan(table, tmp_path):
    table.to_json(tmp_path / "table.json")

    def refuse(name):
        raise AssertionError(f"{name} isn't JSON")

    document = json.loads((tmp_path / "table.json").read_text(), parse_constant=refuse)
    assert document["per_text"][0]["values"] == [0.5, None, 0.25, 1 / 3]
    assert document["rows"][-1]["mean"] is None


def test_pictures_and_pages(table, tmp_path, capsys):
    table.to_png(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    page = table.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
    assert "<b>" not in page and "&lt;b&gt;" in page and "\x1b" not in page
    table.show()
    shown = capsys.readouterr().out
    assert "0.361" in shown and "curve.0.5" not in shown and "\x1b" not in shown

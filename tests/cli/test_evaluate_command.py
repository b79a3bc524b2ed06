"""`pyglobenc evaluate` reads a file, and writes a folder with which it can go on."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

import pyglobenc
from pyglobenc.cli.main import main
from pyglobenc.evaluate.attributions import Attributor

TEXTS = ["the film is good.", "", "bad film, deep good?", "deep the good", "the deep film"]
LABELS = [1, 0, 0, 1, 0]
FILES = {"table.csv", "per_text.parquet", "curves.png", "index.html"}


@pytest.fixture(autouse=True)
def minilm_is_tiny(monkeypatch):
    monkeypatch.setattr(
        "pyglobenc.models.pretrained.load_pretrained", lambda *args: (tiny.classifier(), tiny.tokenizer())
    )


def write(path):
    rows = list(zip(TEXTS, LABELS, strict=True))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS, "label": LABELS}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        sign = "\t" if path.suffix == ".tsv" else ","
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter=sign).writerows([("text", "label"), *rows])
    return path


def run(path, output, *options):
    return main(["evaluate", "--input", str(path), "--output", str(output), "--quiet", *options])


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_reads_every_format_with_labels(tmp_path, suffix, capsys):
    path, output = write(tmp_path / f"data{suffix}"), tmp_path / "out"
    options = ("--label-column", "label", "--target", "label", "--methods", "globenc,lrp", "--limit", "3")
    assert run(path, output, *options) == 0
    assert "1 records are left out, the first one: record 1: empty text" in capsys.readouterr().err
    assert {file.name for file in output.iterdir()} > FILES
    texts, labels = [TEXTS[i] for i in (0, 2, 3)], [LABELS[i] for i in (0, 2, 3)]
    table = pyglobenc.evaluate(
        tiny.classifier(),
        tiny.tokenizer(),
        texts,
        labels=labels,
        target="label",
        methods=("globenc", "lrp"),
        progress=False,
    )
    with open(output / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, own in zip(rows, table.rows, strict=True):
        assert all(row[name] == str(own[name]) for name in ("method", "metric", "mean", "low", "high", "n"))
    numbers = pq.read_table(output / "per_text.parquet").to_pylist()
    assert [row["index"] for row in numbers[:3]] == [0, 2, 3]
    expected = [value for values in table.per_text.values() for value in values.tolist()]
    assert [row["value"] for row in numbers] == expected


def test_goes_on_and_refuses_another_job(tmp_path, capsys, monkeypatch):
    path, output = write(tmp_path / "data.tsv"), tmp_path / "out"
    assert run(path, output) == 0
    first = (output / "table.csv").read_bytes()
    (output / "table.csv").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Attributor, "attribute", None)
        assert run(path, output) == 0
    assert (output / "table.csv").read_bytes() == first
    assert run(path, output, "--seed", "1") == 1
    assert "another job was started here (settings.seed 0, now 1)" in capsys.readouterr().err
    path.write_text("text\tlabel\nother\t1\nthe film\t0\n")
    assert run(path, output) == 1
    assert "input.sha256" in capsys.readouterr().err


def test_faults_are_named(tmp_path, capsys):
    path = tmp_path / "data.tsv"
    path.write_text("the film is good\t1\ndeep\t0\n")
    assert run(path, tmp_path / "out") == 1
    assert "give --no-header --column 0" in capsys.readouterr().err
    assert run(path, tmp_path / "out", "--no-header", "--label-column", "1", "--target", "label") == 0
    assert run(path, tmp_path / "other", "--no-header", "--label-column", "0") == 1
    assert "a class must be of BAD, GOOD, got 'the film is good'" in capsys.readouterr().err
    assert run(path, tmp_path / "other", "--no-header", "--methods", "globnec") == 1
    assert "methods must be 'all' or of" in capsys.readouterr().err
    assert run(path, tmp_path, "--no-header") == 1
    assert "choose a folder of its own" in capsys.readouterr().err


def test_lists_the_metrics(capsys):
    assert main(["evaluate", "--input", "none", "--output", "none", "--metrics", "help"]) == 0
    assert "comprehensiveness: fall of the probability" in capsys.readouterr().out

"""Columns of the input that accompany the attributions of a corpus."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from pyglobenc.cli.main import main
from pyglobenc.scale.corpus.records import keep_columns, open_source

ROWS = [
    {"id": 7, "sentence": "a good film", "label": "GOOD", "tags": ["x", "\u00e9"]},
    {"id": 8, "sentence": "", "label": "BAD", "tags": []},
    {"id": 9, "sentence": "the deep", "label": None, "tags": None},
    {"id": 10, "sentence": "film", "label": "BAD", "tags": ["y"]},
]
KEPT = [("7", "GOOD", '["x", "\u00e9"]'), ("9", None, None), ("10", "BAD", '["y"]')]


@pytest.fixture(autouse=True)
def minilm_is_tiny(monkeypatch):
    monkeypatch.setattr(
        "pyglobenc.models.pretrained.load_pretrained", lambda *args: (tiny.classifier(), tiny.tokenizer())
    )


def write(folder, suffix):
    path = folder / f"corpus{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        mark = "\t" if suffix == ".tsv" else ","
        lines = [mark.join(str(row[name] or "") for name in ("id", "sentence", "label")) for row in ROWS]
        path.write_text("\n".join([mark.join(("id", "sentence", "label")), *lines]) + "\n")
    return path


def attribute(path, output, *options):
    return main(["attribute", "--input", str(path), "--output", str(output), "--quiet", *options])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".tsv"])
def test_columns_are_kept_beside_the_scores(suffix, tmp_path):
    path, output = write(tmp_path, suffix), tmp_path / "out"
    wide = suffix in (".parquet", ".jsonl")
    names = ["id", "label", "tags"] if wide else ["id", "label"]
    assert attribute(path, output, "--shard-size", "2", "--keep", ",".join(names)) == 0
    rows = pq.read_table(output).to_pylist()
    assert [row["index"] for row in rows] == [0, 2, 3]
    kept = KEPT if wide else [(number, label or "") for number, label, _ in KEPT]
    assert [tuple(row["input"][name] for name in names) for row in rows] == kept
    # The same command finds its job finished, and another choice of columns is another job.
    before = {one.name: one.stat().st_mtime_ns for one in output.glob("*.parquet")}
    assert attribute(path, output, "--shard-size", "2", "--keep", ",".join(names)) == 0
    assert {one.name: one.stat().st_mtime_ns for one in output.glob("*.parquet")} == before
    assert attribute(path, output, "--shard-size", "2") == 1


def test_a_table_without_header_keeps_columns_by_number(tmp_path):
    path, output = tmp_path / "corpus.tsv", tmp_path / "out"
    path.write_text("a good film\t1\nthe deep\t0\n")
    assert attribute(path, output, "--no-header", "--keep", "1") == 0
    assert [row["input"] for row in pq.read_table(output).to_pylist()] == [{"1": "1"}, {"1": "0"}]


def test_a_table_taken_for_one_with_a_header_says_what_to_give(tmp_path, capsys):
    path = tmp_path / "corpus.tsv"
    path.write_text("a good film\t1\nthe deep\t0\n")
    for options in ([], ["--column", "sentence"]):
        assert attribute(path, tmp_path / "out", *options) == 1
        assert "if the first line is a record, give --no-header --column 0" in capsys.readouterr().err


def test_columns_that_are_not_there_are_refused(tmp_path):
    for suffix, message in ((".jsonl", "can't keep 'labl': no key 'labl'"), (".csv", "no column 'labl'")):
        path = write(tmp_path, suffix)
        with pytest.raises(ValueError, match=message):
            keep_columns(open_source(path), ["labl"])


def test_the_error_of_each_record_is_kept(tmp_path):
    path, output = write(tmp_path, ".jsonl"), tmp_path / "out"
    assert attribute(path, output, "--method", "integrated-gradients") == 0
    errors = pq.read_table(output).column("error").to_pylist()
    assert all(0 <= error <= 1e-2 for error in errors)
    assert attribute(path, tmp_path / "other") == 0
    assert pq.read_table(tmp_path / "other").column("error").to_pylist() == [None] * 3

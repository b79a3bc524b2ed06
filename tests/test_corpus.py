"""Corpora: every format read, every record accounted for, and the same shards whatever happens on the way."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from models import build

import pyglobenc
from pyglobenc.cli import main
from pyglobenc.corpus import job, manifest, shards
from pyglobenc.corpus.records import Record, open_source
from pyglobenc.memory import estimate_memory

KILLS = Path(__file__).parents[1] / "benchmarks" / "corpus_kills.py"
TEXTS = ["a good film", "the deep", "good good good film film the deep", "", "deep " * 60, "a", "the film, good!", "b c", "no\ud800", "x"]
BAD = {3: "empty text", 4: "tokens and at most 40 fit", 8: "not UTF-8"}


@pytest.fixture
def minilm_is_tiny(monkeypatch):
    """The command line loads the small classifier."""
    monkeypatch.setattr("pyglobenc.hf.pretrained.load_pretrained", lambda *args: (tiny.classifier(), tiny.tokenizer()))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(corpus, output, *options):
    return main(["attribute", "--input", str(corpus), "--output", str(output), "--quiet", "--shard-size", "4", *options])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder):
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def rejected(folder):
    lines = [line for path in sorted(folder.glob("_rejected-*.jsonl")) for line in path.read_text().splitlines()]
    return {entry["index"]: entry["reason"] for entry in map(json.loads, lines)}


def test_every_record_is_attributed_or_reported(corpus, tmp_path, minilm_is_tiny):
    assert run(corpus, tmp_path / "out") == 0
    found, left_out = rows(tmp_path / "out"), rejected(tmp_path / "out")
    assert [row["index"] for row in found] == [i for i in range(len(TEXTS)) if i not in BAD], "in input order, none twice"
    assert left_out.keys() == BAD.keys() and all(BAD[index] in reason for index, reason in left_out.items())
    for row in found:
        alone = pyglobenc.explain(tiny.classifier(), tiny.tokenizer(), TEXTS[row["index"]])
        assert (row["text"], row["tokens"], row["target_name"]) == (alone.text, alone.tokens, "[CLS]")
        # the arithmetic is double, so padding changes no more than the last digits
        np.testing.assert_allclose(row["scores"], alone.scores, rtol=1e-10)
        assert row["log_scale"] == pytest.approx(alone.log_scale, rel=1e-10) and row["label"] == alone.label
        assert (row["method"], row["model"]) == ("globenc", manifest.model_fingerprint(tiny.classifier()))
    # the folder is one table to any reader
    assert pq.read_table(tmp_path / "out").num_rows == len(found)


def test_other_methods_explain_a_class(corpus, tmp_path, minilm_is_tiny):
    assert run(corpus, tmp_path / "out", "--method", "transformer-attribution", "--target", "1") == 0
    for row in rows(tmp_path / "out"):
        alone = pyglobenc.explain(tiny.classifier(), tiny.tokenizer(), row["text"], method="transformer-attribution", target=1)
        assert (row["target"], row["target_name"], row["target_kind"]) == (1, "GOOD", "class")
        np.testing.assert_allclose(row["scores"], alone.scores, rtol=1e-6, atol=1e-6 * np.abs(alone.scores).max())


def test_number_of_ranks_does_not_matter(corpus, tmp_path, minilm_is_tiny, monkeypatch):
    assert run(corpus, tmp_path / "one") == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert run(corpus, tmp_path / "three") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_windows_and_batches(tmp_path, minilm_is_tiny):
    (tmp_path / "long.txt").write_text("the deep film " * 30 + "\ngood film\n")
    options = ["--long", "windows", "--max-length", "20"]
    assert run(tmp_path / "long.txt", tmp_path / "out", *options, "--batch-tokens", "40") == 0
    for row in rows(tmp_path / "out"):
        alone = pyglobenc.explain(tiny.classifier(), tiny.tokenizer(), row["text"], long="windows", max_length=20)
        np.testing.assert_allclose(row["scores"], alone.scores, rtol=1e-10)


@pytest.mark.parametrize("model", [lambda: build("bert"), tiny.classifier], ids=["encoder", "classifier"])
def test_packed_and_padded_batches_agree(tmp_path, monkeypatch, model):
    # in double arithmetic
    monkeypatch.setattr("pyglobenc.hf.pretrained.load_pretrained", lambda *args: (model(), tiny.tokenizer()))
    (tmp_path / "corpus.txt").write_text("\n".join(text for text in TEXTS if "\ud800" not in text))
    options = ("--long", "windows", "--max-length", "9", "--batch-tokens", "64")
    for name, flags in (("packed", ()), ("padded", ("--no-packed",))):
        assert run(tmp_path / "corpus.txt", tmp_path / name, *options, *flags) == 0
        assert json.loads((tmp_path / name / "_manifest.json").read_text())["settings"]["packed"] == (name == "packed")
    found, expected = rows(tmp_path / "packed"), rows(tmp_path / "padded")
    assert [row["index"] for row in found] == [row["index"] for row in expected] and len(found) > 5
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=1e-9, atol=1e-12)
        assert one["log_scale"] == pytest.approx(other["log_scale"], rel=1e-9) and one["target_name"] == "[CLS]"
        assert one["label"] == other["label"] and one["probability"] == (other["probability"] and pytest.approx(other["probability"]))


@pytest.mark.parametrize("method", ["transformer-attribution", "partial-lrp"])
def test_relevance_is_packed_when_asked_for(corpus, tmp_path, minilm_is_tiny, method):
    for name, flags in (("packed", ("--packed",)), ("padded", ())):
        assert run(corpus, tmp_path / name, "--method", method, *flags) == 0
        assert json.loads((tmp_path / name / "_manifest.json").read_text())["settings"]["packed"] == (name == "packed")
    for one, other in zip(rows(tmp_path / "packed"), rows(tmp_path / "padded"), strict=True):
        largest = max(map(abs, other["scores"]))
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=1e-6, atol=1e-6 * largest)
        assert (one["target"], one["label"]) == (other["target"], other["label"])


def test_what_cannot_be_packed_says_why(corpus, tmp_path, minilm_is_tiny, capsys):
    assert run(corpus, tmp_path / "out", "--packed", "--method", "attention-flow") != 0
    assert "attention-flow takes no packed texts" in capsys.readouterr().err
    with pytest.raises(ValueError, match="MPNetModel computes attention itself"):
        job.make_runner(build("mpnet"), tiny.tokenizer(), packed=True)
    assert not job.make_runner(build("mpnet"), tiny.tokenizer(), packed=None).packed


def test_buckets_hold_like_lengths_within_the_budget():
    runner = job.make_runner(tiny.classifier(), tiny.tokenizer())
    records = [Record(i, "a " * (1 + i * 7 % 30)) for i in range(60)]
    texts, _ = job.encode_records(runner, records)
    found = list(job.buckets(texts, 128))
    assert sorted(index for bucket in found for index, _ in bucket) == list(range(60))
    for bucket in found:
        widths = [len(text.tokens) for _, text in bucket]
        assert max(widths) * len(bucket) <= 128 or len(bucket) == 1
        assert widths == sorted(widths)
    # greedy: no bucket could have taken the next text too
    for bucket, after in zip(found, found[1:], strict=False):
        assert (len(bucket) + 1) * len(after[0][1].tokens) > 128


def test_a_text_that_breaks_its_batch_is_left_out_alone():
    class Fussy(job.Runner):
        def run(self, texts):
            if any("film" in text.tokens for text in texts):
                raise ValueError("not this one")
            return super().run(texts)

    runner = Fussy(tiny.classifier(), tiny.tokenizer(), job.Options())
    found, left_out = job.attribute_records(runner, [Record(i, text) for i, text in enumerate(["a b", "a film", "b c"])], 4096)
    assert [row["index"] for row in found] == [0, 2] and left_out == [{"index": 1, "reason": "not this one"}]


def test_settings_that_fail_for_every_text_stop_the_job(corpus, tmp_path, minilm_is_tiny, capsys):
    assert run(corpus, tmp_path / "out", "--backend", "cuda") == 1
    assert "backend 'cuda' can't run" in capsys.readouterr().err
    # nothing that would refuse the settings put right
    assert not (tmp_path / "out").exists()


def test_a_rank_beyond_the_others_is_refused(corpus, tmp_path, minilm_is_tiny, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run(corpus, tmp_path / "out") == 1
    assert "RANK must lie in [0, 1)" in capsys.readouterr().err


def test_nothing_attributed_is_a_failure(tmp_path, minilm_is_tiny, capsys):
    (tmp_path / "blank.txt").write_text("\n\n")
    assert run(tmp_path / "blank.txt", tmp_path / "out") == 1
    assert rejected(tmp_path / "out") == {0: "empty text", 1: "empty text"}
    assert "not one record could be attributed" in capsys.readouterr().err


def write_datasets(folder, texts):
    """What datasets' save_to_disk leaves: Arrow streams and a list of them."""
    folder.mkdir()
    names = []
    for number, part in enumerate((texts[:2], texts[2:])):
        names.append({"filename": f"data-{number:05d}-of-00002.arrow"})
        table = pa.table({"label": [0] * len(part), "sentence": part})
        with pa.OSFile(str(folder / names[-1]["filename"]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": names}))
    return folder


def write_as(suffix, path, texts):
    if suffix == "datasets":
        return write_datasets(path, texts)
    path = path.with_suffix(f".{suffix}")
    if suffix == "parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif suffix == "csv":
        quoted = ('"' + text.replace('"', '""') + '"' for text in texts)
        path.write_bytes(("\ufeffid,text\r\n" + "".join(f"7,{text}\r\n" for text in quoted)).encode())
    elif suffix == "tsv":
        path.write_text("text\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    return path


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "parquet", "datasets"])
def test_formats(suffix, tmp_path):
    texts = ["one, film", 'a "quote', "été \u2028 line", "last"]
    source = open_source(write_as(suffix, tmp_path / "corpus", texts))
    for _ in range(2):
        assert [(record.index, record.text) for record in source.records()] == list(enumerate(texts))


@pytest.mark.parametrize(
    "name, data, reasons",
    [
        ("a.txt", b"good\n\xff\xfe bad\n\nlast", [None, "not UTF-8", "empty", None]),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n\n[1]\n{"text": 3}\n"b"\n', [None, "JSON", "no text", "key", "str", None]),
        ("a.csv", b'id,text\n1,a\n2\n3,"b\nc"\n4,\xe9\n', [None, "1 columns", None, "not UTF-8"]),
        # a quote that is never closed takes the rest with it, and says so
        ("a.csv", b'text\na\n"b\nc\n', [None, "not CSV: unexpected end of data (lines 3 to 4)"]),
    ],
)
def test_bad_records_are_named_and_passed_over(name, data, reasons, tmp_path):
    (tmp_path / name).write_bytes(data)
    found = list(open_source(tmp_path / name).records())
    assert [record.index for record in found] == list(range(len(reasons)))
    for record, reason in zip(found, reasons, strict=True):
        assert (record.reason is None) == (reason is None) == (record.text is not None), record
        assert reason is None or reason in record.reason


def test_null_in_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    assert [record.reason for record in open_source(tmp_path / "a.parquet").records()] == [None, "no text"]


def test_every_parquet_file_must_hold_texts(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).dictionary_encode()}), tmp_path / "1.parquet")
    assert [record.text for record in open_source(tmp_path).records()] == ["a", "b"]
    for wrong, message in (({"text": [b"a"]}, "2.parquet: the column 'text' must hold strings, it holds binary"), ({"x": [""]}, "has x")):
        pq.write_table(pa.table(wrong), tmp_path / "2.parquet")
        with pytest.raises(ValueError, match=message):
            list(open_source(tmp_path).records())


@pytest.mark.parametrize(
    "name, data, options",
    [
        ("a.jsonl", b'{"sentence": "a, b", "label": 1}\n', {}),
        ("a.jsonl", b'{"body": "a, b"}\n', {}),
        ("a.csv", b'\xef\xbb\xbf"a, b",1\n', {"header": False}),
    ],
)
def test_the_text_is_found(name, data, options, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert [record.text for record in open_source(tmp_path / name, **options).records()] == ["a, b"]


@pytest.mark.parametrize(
    "name, data, options, message",
    [
        ("a.csv", b"one,two\n1,2\n", {}, "which column holds the text? It has one, two"),
        ("a.csv", b"one,two\n1,2\n", {"column": "three"}, "no column 'three'; it has one, two"),
        ("a.tsv", b"x\ty\n", {"header": False, "column": "2"}, "number below 2"),
        ("a.xml", b"<a/>", {}, "unknown format '.xml'"),
        ("a.csv", b"", {}, "the first row is empty"),
        ("a.txt", b"a\n", {"column": "text"}, "a text file has no columns, got 'text'"),
        ("a.csv", "text\na film\n".encode("utf-16"), {}, "is UTF-16, not UTF-8"),
        ("a.json", b'[\n {"text": "a"},\n {"text": "b"}\n]\n', {}, "begins with a JSON array"),
        ("a.parquet", b"PAR1", {}, "a.parquet: can't be read"),
    ],
)
def test_unusable_input(name, data, options, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        open_source(tmp_path / name, **options)


def test_folders_that_are_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="no state.json"):
        open_source(tmp_path)
    for state, message in (("{}", "doesn't list"), ('{"_data_files": [3]}', "doesn't list"), ('{"_data_files": []}', "no record")):
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("{}")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(ValueError, match="test, train"):
        open_source(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="read more than once"):
        open_source(tmp_path / "pipe.txt")
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "none")


def test_another_job_is_refused(corpus, tmp_path, minilm_is_tiny, capsys):
    out = tmp_path / "out"
    assert run(corpus, out) == 0
    before = contents(out)
    assert run(corpus, out) == 0, "a finished job has nothing left to do"
    assert run(corpus, out, "--method", "n") == 1
    assert "settings.method 'globenc', now 'n'" in capsys.readouterr().err
    corpus.write_text(corpus.read_text() + '{"text": "more"}\n')
    assert run(corpus, out) == 1
    assert "input.records 10, now 11" in capsys.readouterr().err
    assert contents(out) == before
    (out / manifest.NAME).unlink()
    assert run(corpus, out) == 1
    assert "no _manifest.json" in capsys.readouterr().err


def test_fingerprints_see_weights_and_config():
    model = tiny.build("bert", num_hidden_layers=1)
    first = manifest.model_fingerprint(model)
    assert first == manifest.model_fingerprint(tiny.build("bert", num_hidden_layers=1))
    model.config.layer_norm_eps *= 2
    second = manifest.model_fingerprint(model)
    model.embeddings.word_embeddings.weight.data[5, 5] += 1e-12
    assert len({first, second, manifest.model_fingerprint(model)}) == 3


@pytest.mark.parametrize("writes", range(1, 5))
def test_full_disk_leaves_a_job_that_goes_on(corpus, tmp_path, minilm_is_tiny, monkeypatch, capsys, writes):
    assert run(corpus, tmp_path / "whole") == 0
    left, sync = [writes], os.fsync

    def fills_up(handle):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fills_up)
        patch.setattr(shards, "_sync_folder", lambda folder: None)
        assert run(corpus, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "out") in error and "No space left on device" in error and error.count("\n") == 1
    assert run(corpus, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_jobs_on_one_folder(corpus, tmp_path, minilm_is_tiny, capsys):
    assert run(corpus, tmp_path / "out") == 0
    for path in (tmp_path / "out").glob("part-*"):
        path.unlink()
    plan = job.Plan(None, tmp_path / "out", 4, 4096, {})
    with job._alone(plan):
        assert run(corpus, tmp_path / "out") == 1
    assert "another process is at work" in capsys.readouterr().err


def test_dry_run_changes_nothing(corpus, tmp_path, minilm_is_tiny, capsys):
    assert run(corpus, tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "10 records in 3 shards, 0 of them done" in printed and f"{len(BAD)} records would be left out; 3 batches" in printed
    estimate = estimate_memory(tiny.classifier(), batch=3, n=9)
    assert f"memory: {estimate} at the largest batch, 3 x 9 tokens" in printed
    assert not (tmp_path / "out").exists()


def test_killed_at_any_moment(tmp_path):
    """A real SIGKILL, three times; `benchmarks/corpus_kills.py` does it twenty times on a larger job."""
    tiny.classifier().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("".join(f"the film {'good ' * (i % 20)}\n" for i in range(400)) + "\n")
    command = [sys.executable, str(KILLS), "--kills", "3", "--model", str(tmp_path / "model")]
    command += ["--input", str(tmp_path / "corpus.txt"), "--shard-size", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equals the uninterrupted one" in done.stdout


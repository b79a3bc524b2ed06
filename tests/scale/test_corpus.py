"""Corpora: every format read, every record accounted for, and the same shards whatever happens on the way."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from models import build, randomize
from transformers import BertForMaskedLM

import pyglobenc
from pyglobenc.cli.main import main
from pyglobenc.common import files
from pyglobenc.inputs.batching import buckets
from pyglobenc.methods.memory import estimate_memory
from pyglobenc.scale.corpus import job, manifest, reading, records, shards
from pyglobenc.scale.corpus.records import Record, open_source

FAULTS = Path(__file__).parents[1] / "support" / "corpus_faults.py"
KILLS = Path(__file__).parents[2] / "benchmarks" / "corpus_kills.py"
TEXTS = [
    "a good film",
    "the deep",
    "good good good film film the deep",
    "",
    "deep " * 60,
    "a",
    "the film, good!",
    "b c",
    "no\ud800",
    "x",
]
BAD = {3: "empty text", 4: "tokens and at most 40 fit", 8: "not UTF-8"}


@pytest.fixture
def minilm_is_tiny(monkeypatch):
    """The command line loads the small classifier."""
    monkeypatch.setattr(
        "pyglobenc.models.pretrained.load_pretrained", lambda *args: (tiny.classifier(), tiny.tokenizer())
    )


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(corpus, output, *options):
    return main(
        [
            "attribute",
            "--input",
            str(corpus),
            "--output",
            str(output),
            "--quiet",
            "--shard-size",
            "4",
            *options,
        ]
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder):
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def rejected(folder):
    lines = [
        line for path in sorted(folder.glob("_rejected-*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {entry["index"]: entry["reason"] for entry in map(json.loads, lines)}


def test_every_record_is_attributed_or_reported(corpus, tmp_path, minilm_is_tiny):
    assert run(corpus, tmp_path / "out") == 0
    found, left_out = rows(tmp_path / "out"), rejected(tmp_path / "out")
    assert [row["index"] for row in found] == [i for i in range(len(TEXTS)) if i not in BAD], (
        "in input order, none twice"
    )
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
        alone = pyglobenc.explain(
            tiny.classifier(), tiny.tokenizer(), row["text"], method="transformer-attribution", target=1
        )
        assert (row["target"], row["target_name"], row["target_kind"]) == (1, "GOOD", "class")
        np.testing.assert_allclose(
            row["scores"], alone.scores, rtol=1e-6, atol=1e-6 * np.abs(alone.scores).max()
        )


def test_windows_and_batches(tmp_path, minilm_is_tiny):
    (tmp_path / "long.txt").write_text("the deep film " * 30 + "\ngood film\n")
    options = ["--long", "windows", "--max-length", "20"]
    assert run(tmp_path / "long.txt", tmp_path / "out", *options, "--batch-tokens", "40") == 0
    for row in rows(tmp_path / "out"):
        alone = pyglobenc.explain(
            tiny.classifier(), tiny.tokenizer(), row["text"], long="windows", max_length=20
        )
        np.testing.assert_allclose(row["scores"], alone.scores, rtol=1e-10)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification", None])
def test_what_a_classifier_predicts_is_kept(tmp_path, monkeypatch, kind):
    model = build("bert-classifier", num_labels=3, problem_type=kind)
    monkeypatch.setattr(
        "pyglobenc.models.pretrained.load_pretrained", lambda *args: (model, tiny.tokenizer())
    )
    (tmp_path / "corpus.txt").write_text("good film\ndeep\n")
    assert run(tmp_path / "corpus.txt", tmp_path / "out") == 0
    for row in rows(tmp_path / "out"):
        alone = pyglobenc.explain(model, tiny.tokenizer(), row["text"])
        found = {entry["name"]: entry["value"] for entry in row["predictions"]}
        assert found == pytest.approx(dict(alone.predictions), rel=1e-9) and row["label"] == alone.label


def test_masks_are_filled_and_a_mean_is_explained(tmp_path, monkeypatch, minilm_is_tiny):
    (tmp_path / "corpus.txt").write_text("good [MASK]\ndeep\n")
    assert run(tmp_path / "corpus.txt", tmp_path / "mean", "--target", "mean") == 0
    assert {row["target_kind"] for row in rows(tmp_path / "mean")} == {"mean"}
    config = build("bert").config
    model = randomize(BertForMaskedLM(config)).double().eval()
    monkeypatch.setattr(
        "pyglobenc.models.pretrained.load_pretrained", lambda *args: (model, tiny.tokenizer())
    )
    run(tmp_path / "corpus.txt", tmp_path / "out", "--method", "saliency")
    (row,), left_out = rows(tmp_path / "out"), rejected(tmp_path / "out")
    assert row["text"] == "good [MASK]" and "has 0" in left_out[1]


@pytest.mark.parametrize("model", [lambda: build("bert"), tiny.classifier], ids=["encoder", "classifier"])
def test_packed_and_padded_batches_agree(tmp_path, monkeypatch, model):
    # in double arithmetic
    monkeypatch.setattr(
        "pyglobenc.models.pretrained.load_pretrained", lambda *args: (model(), tiny.tokenizer())
    )
    (tmp_path / "corpus.txt").write_text("\n".join(text for text in TEXTS if "\ud800" not in text))
    options = ("--long", "windows", "--max-length", "9", "--batch-tokens", "64")
    for name, flags in (("packed", ()), ("padded", ("--no-packed",))):
        assert run(tmp_path / "corpus.txt", tmp_path / name, *options, *flags) == 0
        assert json.loads((tmp_path / name / "_manifest.json").read_text())["settings"]["packed"] == (
            name == "packed"
        )
    found, expected = rows(tmp_path / "packed"), rows(tmp_path / "padded")
    assert [row["index"] for row in found] == [row["index"] for row in expected] and len(found) > 5
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=1e-9, atol=1e-12)
        assert (
            one["log_scale"] == pytest.approx(other["log_scale"], rel=1e-9) and one["target_name"] == "[CLS]"
        )
        assert one["label"] == other["label"] and one["probability"] == (
            other["probability"] and pytest.approx(other["probability"])
        )


@pytest.mark.parametrize("method", ["transformer-attribution", "partial-lrp"])
def test_relevance_is_packed_when_asked_for(corpus, tmp_path, minilm_is_tiny, method):
    for name, flags in (("packed", ("--packed",)), ("padded", ())):
        assert run(corpus, tmp_path / name, "--method", method, *flags) == 0
        assert json.loads((tmp_path / name / "_manifest.json").read_text())["settings"]["packed"] == (
            name == "packed"
        )
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
    found = list(buckets(texts, 128))
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
        def run(self, texts, **options):
            if any("film" in text.tokens for text in texts):
                raise ValueError("not this one")
            return super().run(texts, **options)

    runner = Fussy(tiny.classifier(), tiny.tokenizer(), job.Options())
    found, left_out = job.attribute_records(
        runner, [Record(i, text) for i, text in enumerate(["a b", "a film", "b c"])], 4096
    )
    assert [row["index"] for row in found] == [0, 2] and left_out == [{"index": 1, "reason": "not this one"}]


def test_settings_that_fail_for_every_text_stop_the_job(corpus, tmp_path, minilm_is_tiny, capsys):
    assert run(corpus, tmp_path / "out", "--backend", "cuda") == 1
    assert "backend 'cuda' can't run" in capsys.readouterr().err
    # nothing that would refuse the settings put right
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--concurrency", "2"), "--concurrency belongs to --engine ray, not to --engine local"),
        (("--num-gpus", "0.5"), "--num-gpus belongs to --engine ray, not to --engine local"),
        (("--engine", "ray", "--device", "cpu"), "--device belongs to --engine local, not to --engine ray"),
        (("--engine", "ray", "--dry-run"), "--dry-run belongs to --engine local, not to --engine ray"),
        (("--engine", "ray", "--num-gpus", "1.5"), "invalid number, whole or below 1 value"),
    ],
)
def test_options_of_the_other_engine_are_refused(corpus, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        run(corpus, tmp_path / "out", *options)
    assert message in capsys.readouterr().err


def test_without_ray_its_engine_is_refused(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(corpus, tmp_path / "out", "--engine", "ray") == 1
    assert "pip install 'ray[data]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_output_that_does_not_become_whole_is_a_failure(
    corpus, tmp_path, minilm_is_tiny, monkeypatch, capsys
):
    def write_then_damage(folder, part, *rest):
        shards.write_shard(folder, part, *rest)
        if part.shard == 1:
            DAMAGE["cut by a byte"](shards.shard_path(folder, 1), None)

    monkeypatch.setattr(job, "write_shard", write_then_damage)
    assert run(corpus, tmp_path / "out") == 1
    assert "1 of 3 shards aren't complete after the job" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / manifest.NAME).read_text())["complete"] is False


@pytest.mark.parametrize("size", range(1, 12))
def test_every_shard_begins_in_one_file(size):
    counts = [7, 1, 0, 16, 9]
    ends = [sum(counts[:number]) for number in range(len(counts) + 1)]
    found = reading.shards_by_file(counts, size)
    assert [shard for each in found for shard in each] == list(range(-(-ends[-1] // size)))
    for start, stop, each in zip(ends, ends[1:], found, strict=False):
        assert all(start <= shard * size < stop for shard in each)


@pytest.mark.parametrize("start", range(7))
def test_reading_begins_anywhere(start, tmp_path):
    for number, texts in enumerate((["a", "b"], [], ["c"], ["d", "e", "f"])):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / f"{number}.parquet")
    source = open_source(tmp_path)
    for counts in ((), (2,), (2, 0, 1, 3)):
        found = [(record.index, record.text) for record in source.records(start, counts)]
        assert found == list(enumerate("abcdef"))[start:]
    parts = list(reading.survey_source(source, 2).parts)
    found = list(reading.read_parts(source, 2, (2, 0, 1, 3), parts[1:]))
    assert [(part.shard, records[0].text) for part, records in found] == [(1, "c"), (2, "e")]
    for wrong in (replace(parts[1], sha256=""), replace(parts[2], shard=7)):
        with pytest.raises(reading.InputChanged, match="changed while the job ran") as error:
            list(reading.read_parts(source, 2, (), [parts[0], wrong]))
        assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_addresses_are_read(tmp_path):
    upath = pytest.importorskip("upath", reason="needs universal-pathlib")
    bucket = upath.UPath("memory://bucket/corpus")
    bucket.mkdir(parents=True, exist_ok=True)
    for suffix in ("txt", "csv", "jsonl", "parquet"):
        local = write_as(suffix, tmp_path / "corpus", ["one, film", "", "last"])
        (bucket / local.name).write_bytes(local.read_bytes())
        for address in (f"memory://bucket/corpus/{local.name}", local.as_uri()):
            source = open_source(address)
            assert list(source.records()) == list(open_source(local).records())
            assert source.sha256() == open_source(local).sha256()
            assert (source.places() == []) == address.startswith("memory:")
    source = open_source("memory://bucket/corpus")
    assert [path.name for path in source.files] == ["corpus.parquet"] and len(list(source.records())) == 3
    with pytest.raises(FileNotFoundError, match="memory://bucket/none.txt"):
        open_source("memory://bucket/none.txt")


def test_an_address_needs_its_package_and_is_no_output(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "upath", None)
    assert run("s3://bucket/corpus.txt", tmp_path / "out") == 1
    assert "pip install universal-pathlib" in capsys.readouterr().err
    assert run(corpus, "s3://bucket/out") == 1
    assert "s3://bucket/out: the output must be a folder" in capsys.readouterr().err


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
        with (
            pa.OSFile(str(folder / names[-1]["filename"]), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as stream,
        ):
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
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text"\n\n[1]\n{"text": 3}\n"b"\n',
            [None, "JSON", "no text", "key", "str", None],
        ),
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
    for wrong, message in (
        ({"text": [b"a"]}, "2.parquet: the column 'text' must hold strings, it holds binary"),
        ({"x": [""]}, "has x"),
    ):
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
        ("a.csv", b"one,two\n1,2\n", {}, "name the column that holds the text, one of one, two"),
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
    for state, message in (
        ("{}", "doesn't list"),
        ('{"_data_files": [3]}', "doesn't list"),
        ('{"_data_files": []}', "no record"),
    ):
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
        patch.setattr(files, "_sync_folder", lambda folder: None)
        assert run(corpus, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "out") in error and "No space left on device" in error and error.count("\n") == 1
    assert run(corpus, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_that_another_process_computes_is_waited_for(
    corpus, tmp_path, minilm_is_tiny, monkeypatch, capsys
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(corpus, whole) == 0
    assert run(corpus, out) == 0
    names = ["part-000001.parquet", "_rejected-000001.jsonl"]
    for name in ("part-000002.parquet", *names):
        (out / name).unlink()
    lock, order = shards._lock, []
    with shards.locked(out, "000001", wait=False) as held:
        assert held

        def locking(handle, wait):
            if wait and not (out / names[0]).exists() and order:
                # the other process is done while this one waits
                for name in names:
                    (out / name).write_bytes((whole / name).read_bytes())
                fcntl.flock(handle_of_other, fcntl.LOCK_UN)
            order.append(wait)
            return lock(handle, wait)

        handle_of_other = next(
            int(name)
            for name in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{name}") == str(out / ".lock-000001")
        )
        monkeypatch.setattr(shards, "_lock", locking)
        assert main(["attribute", "--input", str(corpus), "--output", str(out), "--shard-size", "4"]) == 0
    assert "1 attributed, 8 done before" in capsys.readouterr().err, "shard 2 was computed, shard 1 was not"
    assert contents(out) == contents(whole)


def test_locks_stay_and_are_the_same(corpus, tmp_path, minilm_is_tiny):
    out = tmp_path / "out"
    assert run(corpus, out) == 0
    locks = {path.name: path.stat().st_ino for path in out.glob(".lock-*")}
    assert locks.keys() == {".lock-000000", ".lock-000001", ".lock-000002", ".lock-manifest"}
    for path in out.glob("part-*"):
        path.unlink()
    assert run(corpus, out) == 0
    assert {path.name: path.stat().st_ino for path in out.glob(".lock-*")} == locks


def test_dry_run_changes_nothing(corpus, tmp_path, minilm_is_tiny, capsys):
    assert run(corpus, tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert (
        "10 records in 3 shards, 0 of them done" in printed
        and f"{len(BAD)} records would be left out; 3 batches" in printed
    )
    estimate = estimate_memory(tiny.classifier(), batch=3, n=9)
    assert f"memory: {estimate} at the largest batch, 3 x 9 tokens" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Real SIGKILLs of whole processes; tests/support/corpus_faults.py has those at every write."""
    tiny.classifier().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text(
        "".join(f"the film {'good ' * (i % 20)}\n" for i in range(400)) + "\n"
    )
    command = [sys.executable, str(KILLS), "--kills", "10", "--model", str(tmp_path / "model")]
    command += ["--input", str(tmp_path / "corpus.txt"), "--shard-size", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equals the uninterrupted one" in done.stdout


def faults(tmp_path, *options):
    paths = os.pathsep.join([str(FAULTS.parent), *filter(None, sys.path)])
    command = [sys.executable, str(FAULTS), str(tmp_path), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_at_every_write_with_jobs_at_once_and_without_room(tmp_path):
    printed = faults(tmp_path, "--pairs", "4")
    assert "killed at 7 writes" in printed and "jobs at once: 4" in printed and "no room" in printed


def with_middle_cut(path, whole):
    data = path.read_bytes()
    path.write_bytes(data[:100] + data[140:])


def with_rows(change):
    def damage(path, whole):
        table = pq.read_table(path)
        pq.write_table(change(table), path)

    return damage


def swapped(path, whole):
    other = path.with_name("part-000000.parquet")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def linked(path, whole):
    path.unlink()
    path.symlink_to(whole / "part-000001.parquet")


SIDE = "_rejected-000001.jsonl"
DAMAGE = {
    "cut by a byte": lambda path, whole: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path, whole: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut in the middle": with_middle_cut,
    "emptied": lambda path, whole: path.write_bytes(b""),
    "with another name of its format": lambda path, whole: path.write_bytes(b"PARX" + path.read_bytes()[4:]),
    "without rows": with_rows(lambda table: table.slice(0, 0)),
    "short of a row": with_rows(lambda table: table.slice(0, table.num_rows - 1)),
    "with a row twice": with_rows(
        lambda table: pa.concat_tables([table.slice(0, 1), table.slice(0, table.num_rows - 1)])
    ),
    "with other rows": with_rows(
        lambda table: table.set_column(0, "index", pa.array([8, 9, 10][: table.num_rows]))
    ),
    "without a column": with_rows(lambda table: table.drop_columns(["cut"])),
    "of nobody": with_rows(lambda table: table.replace_schema_metadata({})),
    "swapped": swapped,
    "a link": linked,
    "of another job": lambda path, whole: path.write_bytes((whole.parent / "other" / path.name).read_bytes()),
    "without its side file": lambda path, whole: path.with_name(SIDE).unlink(),
    "with another side file": lambda path, whole: path.with_name(SIDE).write_text(
        '{"index": 4, "reason": "none"}\n'
    ),
    "with a side file too many": lambda path, whole: path.with_name("_rejected-000000.jsonl").write_text(
        "{}\n" * 2
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A corpus, its finished job, and one of another method."""
    folder = tmp_path_factory.mktemp("finished")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pyglobenc.models.pretrained.load_pretrained", lambda *args: (tiny.classifier(), tiny.tokenizer())
        )
        assert run(corpus, folder / "whole") == 0 and run(corpus, folder / "other", "--method", "n") == 0
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_is_not_what_it_was_is_computed_again(
    finished, tmp_path, minilm_is_tiny, caplog, damage
):
    out = tmp_path / "out"
    shutil.copytree(finished / "whole", out)
    DAMAGE[damage](out / "part-000001.parquet", finished / "whole")
    assert run(finished / "corpus.jsonl", out) == 0
    assert contents(out) == contents(finished / "whole")
    assert "is computed again: " in caplog.text
    assert not (out / "part-000001.parquet").is_symlink()


def test_every_byte_of_a_shard_counts(tmp_path):
    common = {"method": "globenc", "model": "m", "dtype": "float32"}
    part = shards.Part(shard=0, first=4, records=2, sha256="0")
    row = {"index": 4, "text": "a film", "tokens": ["a", "film"], "scores": [0.25, 0.75], "target": 1}
    shards.write_shard(tmp_path, part, [row], [{"index": 5, "reason": "empty text"}], common)
    assert shards.look_at_shard(tmp_path, part, common) == shards.Found(None, rows=1)
    assert row.items() <= pq.read_table(tmp_path).to_pylist()[0].items()
    for path in (shards.shard_path(tmp_path, 0), shards.rejected_path(tmp_path, 0)):
        data = path.read_bytes()
        for place in range(0, len(data), 29):
            flipped = bytes([data[place] ^ 1 << place % 8])
            for bad in (data[:place], data[:place] + flipped + data[place + 1 :]):
                path.write_bytes(bad)
                assert shards.look_at_shard(tmp_path, part, common).lacks, (path.name, place, len(bad))
        path.write_bytes(data)
    assert shards.look_at_shard(tmp_path, part, common).lacks is None


def test_a_finished_job_computes_nothing(finished, tmp_path, minilm_is_tiny, monkeypatch, caplog):
    shutil.copytree(finished / "whole", tmp_path / "out")
    monkeypatch.setattr(job, "attribute_records", None)
    assert run(finished / "corpus.jsonl", tmp_path / "out") == 0 and not caplog.records


def appended(path):
    with open(path, "a") as file:
        file.write('{"text": "one more"}\n')


def replaced(old, new):
    def change(path):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def renamed_over(path):
    other = path.with_suffix(".new")
    other.write_text(path.read_text().replace('"b c"', '"c b"'))
    other.replace(path)


CHANGES = {
    "appended": appended,
    "cut": lambda path: os.truncate(path, 60),
    "emptied": lambda path: os.truncate(path, 0),
    "a record done before": replaced("a good film", "a poor film"),
    "a record to come": replaced('"x"', '"y"'),
    "a line more": replaced('"x"', '"x"}\n{"text": "y"'),
    "another file": renamed_over,
    "no file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shard", [0, 2])
def test_an_input_that_changes_is_noticed(
    finished, tmp_path, minilm_is_tiny, monkeypatch, capsys, change, shard
):
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    shutil.copy(finished / "corpus.jsonl", corpus)
    write = job.write_shard

    def change_then_write(folder, part, *rest):
        if part.shard == shard:
            CHANGES[change](corpus)
        write(folder, part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_shard", change_then_write)
        assert run(corpus, out) == 1
    error = capsys.readouterr().err
    assert "changed while the job ran" in error or (change == "no file" and "No such file" in error)
    assert json.loads((out / manifest.NAME).read_text())["complete"] is False
    # what is there is of the input as it was, and the job goes on with it
    shutil.copy(finished / "corpus.jsonl", corpus)
    assert run(corpus, out) == 0
    assert json.loads((out / manifest.NAME).read_text())["complete"] is True
    assert shards_of(out) == shards_of(finished / "whole")


@pytest.mark.parametrize("suffix", ["parquet", "datasets"])
@pytest.mark.parametrize("change", ["a file more", "a file cut"])
def test_a_folder_that_changes_is_noticed(tmp_path, minilm_is_tiny, monkeypatch, capsys, suffix, change):
    folder, write = tmp_path / "tables", job.write_shard
    if suffix == "datasets":
        write_datasets(folder, ["a", "b", "the film", "good"])
        first, other = folder / "data-00000-of-00002.arrow", folder / "data-00001-of-00002.arrow"
    else:
        folder.mkdir()
        first, other = folder / "1.parquet", folder / "2.parquet"
        for path in (first, other):
            pq.write_table(pa.table({"text": ["the film", "good"]}), path)

    def change_then_write(*args):
        write(*args)
        if change == "a file cut":
            os.truncate(other, 100)
        elif suffix == "parquet":
            shutil.copy(first, folder / "3.parquet")
        else:
            state = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps({"_data_files": state["_data_files"] * 2}))

    monkeypatch.setattr(job, "write_shard", change_then_write)
    assert run(folder, tmp_path / "out", "--shard-size", "2") == 1
    error = capsys.readouterr().err
    assert "changed while the job ran" in error or (change == "a file cut" and "can't be read" in error)
    assert json.loads((tmp_path / "out" / manifest.NAME).read_text())["complete"] is False


def shards_of(folder):
    """Contents but those of the manifest, which names the input."""
    return {name: data for name, data in contents(folder).items() if name != manifest.NAME}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("writes", [1, 2, 3, 5])
def test_a_stopped_job_leaves_nothing_half_written(
    finished, tmp_path, minilm_is_tiny, monkeypatch, capsys, number, writes
):
    before, left, sync = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, [writes], os.fsync

    def stopping(handle):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        sync(handle)

    corpus, out = finished / "corpus.jsonl", tmp_path / "out"
    # a shell that started the tests in the background has SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stopping)
            assert run(corpus, out) == 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err == "pyglobenc: stopped\n" and not list(out.glob(".*.tmp"))
    assert run(corpus, out) == 0 and contents(out) == contents(finished / "whole")


def test_links_in_the_output_lead_nowhere(finished, tmp_path, minilm_is_tiny, capsys):
    corpus = finished / "corpus.jsonl"
    for name in (
        "part-000001.parquet",
        "_rejected-000000.jsonl",
        manifest.NAME,
        ".lock-000001",
        ".lock-manifest",
    ):
        for target in ("victim", "none"):
            out = tmp_path / f"{name}-{target}"
            out.mkdir()
            (tmp_path / "victim").write_text("untouched")
            (out / name).symlink_to(tmp_path / target)
            status, error = run(corpus, out), capsys.readouterr().err
            assert (tmp_path / "victim").read_text() == "untouched" and not (tmp_path / "none").exists()
            if name.endswith((".parquet", ".jsonl")):
                assert (
                    status == (1 if name.endswith(".parquet") and target == "victim" else 0)
                    or "no _manifest.json" in error
                )
            else:
                assert status == 1 and "is a symbolic link" in error, name


def test_what_killed_writers_left_is_removed(finished, tmp_path, minilm_is_tiny):
    out = tmp_path / "out"
    shutil.copytree(finished / "whole", out)
    (out / "part-000001.parquet").unlink()
    for name in (
        ".part-000001.parquet.0123.tmp",
        "._rejected-000001.jsonl.0123.tmp",
        f".{manifest.NAME}.0123.tmp",
    ):
        (out / name).write_text("half")
    assert run(finished / "corpus.jsonl", out) == 0 and contents(out) == contents(finished / "whole")


def test_without_pyarrow_nothing_is_begun(corpus, tmp_path, monkeypatch, capsys):
    def load(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pyglobenc.models.pretrained.load_pretrained", load)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for flags in ((), ("--dry-run",)):
        assert run(corpus, tmp_path / "out", *flags) == 1
        assert "pip install pyarrow" in capsys.readouterr().err and not (tmp_path / "out").exists()


def of_bytes(kind, *texts):
    """An Arrow column of strings that may be no UTF-8."""
    binary = pa.array(texts, pa.large_binary() if kind == pa.large_string() else pa.binary())
    return binary.view(kind)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary", "datasets"])
def test_a_string_that_is_not_utf8_is_left_out_alone(kind, tmp_path):
    column = of_bytes(
        pa.string() if isinstance(kind, str) else kind, b"a", b"bad \xff", None, "\u00e9".encode()
    )
    table = pa.table({"text": column.dictionary_encode() if kind == "dictionary" else column})
    path = tmp_path / "a.parquet"
    if kind == "datasets":
        path = tmp_path / "saved"
        path.mkdir()
        (path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
        with pa.OSFile(str(path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    else:
        pq.write_table(table, path)
    found = list(open_source(path).records())
    assert [record.text for record in found] == ["a", None, None, "\u00e9"]
    assert found[1].reason == "not UTF-8 text (at character 4)" and found[2].reason == "no text"


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv", "parquet", "datasets"])
def test_a_text_that_is_too_long_is_left_out_unread(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 1 << 18)
    texts = ["one", "a" * (1 << 24), "two", "b" * ((1 << 18) + 1), "three"]
    path = write_as(suffix, tmp_path / "corpus", texts)
    tracemalloc.start()
    try:
        found = list(open_source(path).records())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [record.text for record in found] == ["one", None, "two", None, "three"]
    assert all("the text or its line is longer than" in found[i].reason for i in (1, 3))
    assert peak < 8 * records.LONGEST, "a small part of the line"


def test_a_text_of_too_many_characters_is_left_out(tmp_path, minilm_is_tiny):
    (tmp_path / "a.txt").write_text("the film\n" + "a" * (128 * 40 + 1) + "\n" + "a b " * 32 * 40 + "\n")
    assert run(tmp_path / "a.txt", tmp_path / "out") == 0
    assert [row["index"] for row in rows(tmp_path / "out")] == [0]
    reasons = rejected(tmp_path / "out")
    assert (
        reasons[1] == "the text has 5121 characters and at most 5120 are tokenized"
        and "at most 40 fit" in reasons[2]
    )


def test_long_texts_are_tokenized_in_portions(finished, tmp_path, minilm_is_tiny, monkeypatch):
    seen, encode = [], job.encode_records
    monkeypatch.setattr(job, "MAX_CHARACTERS", 30)
    monkeypatch.setattr(
        job,
        "encode_records",
        lambda runner, some: seen.append([one.index for one in some]) or encode(runner, some),
    )
    assert run(finished / "corpus.jsonl", tmp_path / "out") == 0
    assert [index for some in seen for index in some] == list(range(len(TEXTS))) and max(map(len, seen)) < 4
    found, expected = rows(tmp_path / "out"), rows(finished / "whole")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=1e-10)
    assert rejected(tmp_path / "out") == rejected(finished / "whole")


def test_fingerprints_see_a_tokenizer_s_limits_and_rules():
    tokenizers = [tiny.tokenizer(), tiny.tokenizer(model_max_length=30), tiny.tokenizer(cls_token="[SEP]")]
    tokenizers.append(tiny.tokenizer())
    tokenizers[-1].backend_tokenizer.normalizer = None
    found = list(map(manifest.tokenizer_fingerprint, tokenizers))
    assert len(set(found)) == 4
    tokenizers[0]("a", truncation=True, max_length=5, padding=True)
    assert manifest.tokenizer_fingerprint(tokenizers[0]) == found[0], "a call before changes nothing"

"""The function of a batch of texts, in plain calls and in `datasets.Dataset.map`."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import tiny

import pyglobenc
from pyglobenc.integrations.datasets import Attributor
from pyglobenc.scale.corpus.manifest import model_fingerprint

TEXTS = ["a good film", "the deep", "", "deep " * 60, "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    for part in (tiny.classifier(), tiny.tokenizer()):
        part.save_pretrained(path)
    return str(path)


def check(table):
    """Check each row against `explain`."""
    assert table["text"].to_pylist() == TEXTS
    for row in table.to_pylist():
        if row["reason"] is not None:
            assert row["scores"] is None and ("empty text" in row["reason"] or "at most 40" in row["reason"])
            continue
        alone = pyglobenc.explain(tiny.classifier(), tiny.tokenizer(), row["text"])
        assert (row["tokens"], row["label"], row["target_name"]) == (alone.tokens, alone.label, "[CLS]")
        np.testing.assert_allclose(row["scores"], alone.scores, rtol=1e-10)
        assert row["method"] == "globenc" and len(row["model"]) == 64
    assert [reason is None for reason in table["reason"].to_pylist()] == [True, True, False, False, True]


@pytest.mark.parametrize("make", [dict, pa.table, lambda d: {k: np.array(v, object) for k, v in d.items()}])
def test_rows_in_rows_out(make):
    attributor = Attributor(tiny.classifier(), tiny.tokenizer(), column="words", keep=["label"])
    table = attributor(make({"label": [1, 2, 3, 4, 5], "words": TEXTS}))
    check(table)
    assert table["input"].to_pylist() == [{"label": str(number)} for number in range(1, 6)]
    assert "index" not in table.column_names
    for given, numbers in (({}, range(5, 10)), ({"index": [3, 1, 4, 1, 5]}, None)):
        table = attributor(make({"label": [0] * 5, "words": TEXTS} | given), numbers)
        assert table["index"].to_pylist() == (given["index"] if given else list(numbers))


def test_no_rows():
    table = Attributor(tiny.classifier(), tiny.tokenizer())(pa.table({"text": pa.array([], pa.string())}))
    assert table.num_rows == 0 and "scores" in table.column_names


@pytest.mark.parametrize(
    "arguments, batch, error, message",
    [
        (dict(methd="n"), None, TypeError, "takes no methd; did you mean method"),
        (dict(device="cpu"), None, TypeError, "takes no device"),
        (dict(backend="cuda"), None, ValueError, "can't run"),
        (dict(tokenizer=None), None, TypeError, "needs its tokenizer"),
        ({}, [1], TypeError, "got list"),
        ({}, {"a": ["x"], "b": ["y"]}, ValueError, "name the column that holds the text, one of a, b"),
        ({}, {"text": [1]}, ValueError, "the column 'text' must hold strings, it holds int64"),
        (dict(keep=["id"]), {"text": ["a"]}, ValueError, "no column 'id'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, batch, error, message):
    with pytest.raises(error, match=message):
        attributor = Attributor(tiny.classifier(), **({"tokenizer": tiny.tokenizer()} | arguments))
        assert batch is not None
        attributor(batch)


def test_a_copy_loads_the_same_model_or_none(folder, tmp_path):
    attributor = Attributor(folder, method="n")
    data = pickle.dumps(attributor)
    assert len(data) < 4096, "no weights"
    assert pickle.loads(data)({"text": TEXTS[:2]}).equals(attributor({"text": TEXTS[:2]}))
    model = tiny.classifier()
    model.classifier.bias.data += 1
    model.save_pretrained(folder)
    try:
        with pytest.raises(ValueError, match="differ from those in another process"):
            pickle.loads(data)
    finally:
        tiny.classifier().save_pretrained(folder)


def test_map_of_datasets(folder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1, 0]})
    attributor = Attributor(folder, keep=["label"])
    for each in (dataset, dataset.with_format("arrow")):
        found = each.map(attributor, batched=True, batch_size=2, with_indices=True).with_format("arrow")[:]
        check(found)
        assert set(found["model"].to_pylist()) == {model_fingerprint(attributor.runner.model)}
        assert found["index"].to_pylist() == list(range(5))
        assert [row["label"] for row in found["input"].to_pylist()] == list("01010")
    saved = dataset.map(attributor, batched=True, new_fingerprint="one")
    saved.to_parquet(tmp_path / "scores.parquet")
    check(pa.parquet.read_table(tmp_path / "scores.parquet"))

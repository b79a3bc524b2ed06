"""The metrics equal plain loops over one text at a time, without batches; arguments are right or refused."""

import importlib
import signal
import subprocess
import sys
from functools import cache
from itertools import product
from math import ceil, log
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from models import build, randomize
from sweeps import sweep

import pyglobenc
from pyglobenc.evaluate import forwards
from pyglobenc.evaluate import run as run_module
from pyglobenc.evaluate.attributions import Attributor
from pyglobenc.evaluate.metrics import METRICS, perturbation
from pyglobenc.inputs.batches import Runner
from pyglobenc.models.pretrained import load_pretrained

TEXTS = ["the film is good.", "deep the", "bad film, deep good?", "a", "the deep film & the film!", "goo doo"]
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
STEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
METHODS = ("globenc", "attention-rollout", "transformer-attribution", "lrp")
FAITHFULNESS = tuple(metric.name for metric in perturbation.METRICS)
SETTINGS = dict(methods=METHODS, metrics=FAITHFULNESS, progress=False)


@cache
def roberta():
    """A model whose positions depend on the ids, with the tokenizer's padding id."""
    return build("roberta", pad_token_id=0)


@cache
def decoder():
    """A decoder that reads the last token, and a tokenizer without special tokens or a mask token."""
    names = tiny.tokenizer(mask_token=None, cls_token=None, sep_token=None)
    names.backend_tokenizer.post_processor = None
    settings = dict(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=40, pad_token_id=0)
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**settings))
    return randomize(model).double().eval(), names


def evaluate(texts=TEXTS, model=None, tokenizer=None, **changes):
    model, tokenizer = model or tiny.classifier(), tokenizer or tiny.tokenizer()
    return pyglobenc.evaluate(model, tokenizer, texts, **(SETTINGS | changes))


@torch.no_grad()
def run(model, ids, hidden=()):
    """The class probabilities of one text, with the tokens at some positions hidden."""
    mask = [[int(i not in hidden) for i in range(len(ids))]]
    return (
        model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor(mask)).logits.softmax(-1)[0].numpy()
    )


def without(model, tokenizer, ids, removed, remove):
    """The class probabilities of one text without the tokens at some positions."""
    if remove == "pad":
        return run(model, ids, removed)
    if remove == "mask":
        return run(model, [tokenizer.mask_token_id if i in removed else ids[i] for i in range(len(ids))])
    return run(model, [ids[i] for i in range(len(ids)) if i not in removed])


def plain_values(model, tokenizer, found, groups, remove):
    """All faithfulness metrics of one attribution, by definition; groups are the units' positions."""
    ids, whole = found.token_ids, run(model, found.token_ids)
    target = int(whole.argmax())
    ranking = sorted(groups, key=lambda group: -sum(found.scores[i] for i in group))

    def chances(units):
        return without(model, tokenizer, ids, {i for group in units for i in group}, remove)

    def area(order):
        points = [whole[target]]
        points += [chances(order[: ceil(round(step * len(order), 6))])[target] for step in STEPS]
        return sum((a + b) / 2 * 0.1 for a, b in zip(points, points[1:], strict=False)) / 0.9

    counts = [max(1, ceil(fraction * len(groups))) for fraction in FRACTIONS]
    after = [chances(ranking[:count]) for count in counts]
    kept = [chances(ranking[count:]) for count in counts]
    return {
        "comprehensiveness": sum(whole[target] - p[target] for p in after) / len(counts),
        "sufficiency": sum(whole[target] - p[target] for p in kept) / len(counts),
        "log-odds": sum(log(p[target] / whole[target]) for p in after) / len(counts),
        "decision-flips": sum(int(p.argmax()) != target for p in after) / len(counts),
        "positive-perturbation": area(ranking),
        "negative-perturbation": area(ranking[::-1]),
    }


def assert_equals_plain_loop(table, model, tokenizer, remove, words=False, own=None):
    for index, text in enumerate(TEXTS):
        for method in dict.fromkeys(method for method, _ in table.per_text):
            found = pyglobenc.explain(model, tokenizer, text, method, dtype=torch.float64)
            places = [i for i, special in enumerate(found.special) if not special]
            if own is not None:
                places.remove(places[own])
            groups = {}
            for i in places:
                groups.setdefault(found.word_ids[i] if words else i, []).append(i)
            groups = list(groups.values())
            expected = plain_values(model, tokenizer, found, groups, remove) if len(groups) > 1 else {}
            for metric in FAITHFULNESS:
                value = table.per_text[method, metric][index]
                np.testing.assert_allclose(value, expected.get(metric, np.nan), atol=1e-9, err_msg=metric)


@pytest.mark.parametrize(
    "model, remove",
    sweep(
        product((tiny.classifier, roberta), ("mask", "delete", "pad")),
        # test_words_are_removed_whole masks
        [(roberta, "delete"), (tiny.classifier, "pad")],
    ),
)
def test_equals_a_plain_loop(model, remove):
    table = evaluate(model=model(), remove=remove, batch_tokens=64)
    assert_equals_plain_loop(table, model(), tiny.tokenizer(), remove)


def test_words_are_removed_whole():
    table = evaluate(words=True)
    assert_equals_plain_loop(table, tiny.classifier(), tiny.tokenizer(), "mask", words=True)
    assert np.isnan(table.per_text["globenc", "sufficiency"][3]), "one word"


def test_a_decoder_keeps_the_token_that_it_reads():
    model, names = decoder()
    # The rules of relevance don't cover GPT-2.
    table = evaluate(model=model, tokenizer=names, methods=METHODS[:2])
    assert any("no mask token" in note for note in table.notes)
    assert any("reads a token of the text in 6 of 6" in note for note in table.notes)
    assert_equals_plain_loop(table, model, names, "delete", own=-1)


def test_in_float32_too():
    """The padding of a batch changes the last digits of float32 alone."""
    model, names = tiny.minilm() and load_pretrained("minilm-sst2")
    texts = ["a deep and meaningful film .", "not good", "an utterly dull , unfunny mess of a film"]
    table = evaluate(texts, model, names, methods="attention-rollout", batch_tokens=96)
    for index, text in enumerate(texts):
        found = pyglobenc.explain(model, names, text, "attention-rollout")
        groups = [[i] for i, special in enumerate(found.special) if not special]
        expected = plain_values(model, names, found, groups, "mask")
        for metric in FAITHFULNESS:
            value = table.per_text["attention-rollout", metric][index]
            assert value == pytest.approx(expected[metric], abs=1e-6), metric


def test_random_is_the_mean_of_ten_rankings():
    table = evaluate(["the film is good."] * 300, methods="random", metrics="comprehensiveness", seed=3)
    values = table.per_text["random", "comprehensiveness"]
    # Removing one of m units at random, on average, is the mean over all units.
    one = evaluate(
        ["the film is good."] * 300, methods="random", metrics="comprehensiveness", fractions=[0.01]
    )
    found = pyglobenc.explain(tiny.classifier(), tiny.tokenizer(), "the film is good.")
    ids, whole = found.token_ids, run(tiny.classifier(), found.token_ids)
    places = [i for i, special in enumerate(found.special) if not special]
    falls = [
        (whole - without(tiny.classifier(), tiny.tokenizer(), ids, {i}, "mask"))[whole.argmax()]
        for i in places
    ]
    means = one.per_text["random", "comprehensiveness"]
    # The mean of ten draws has the standard error sd / sqrt(10). Seven of those of 300 texts are allowed.
    assert abs(means.mean() - np.mean(falls)) < 7 * np.std(falls) / np.sqrt(10 * 300)
    assert np.std(means) == pytest.approx(np.std(falls) / np.sqrt(10), rel=0.3)
    assert len(set(values.tolist())) > 100, "each text has its own rankings"


def test_equal_scores_are_ranked_at_random_and_counted(monkeypatch):
    def flat(self, texts, *rest):
        for text in texts:
            yield {"scores": np.zeros(len(text.tokens)), "target": 0, "target_kind": "token"}

    monkeypatch.setattr(Runner, "run", flat)
    table = evaluate(["deep the film"] * 40, methods="globenc", metrics="comprehensiveness", fractions=[0.01])
    assert len(set(table.per_text["globenc", "comprehensiveness"].round(12).tolist())) == 3
    assert (table.rows[0]["ties"], table.rows[0]["zeros"], table.rows[0]["n"]) == (40, 40, 40)
    again = evaluate(["deep the film"] * 40, methods="globenc", metrics="comprehensiveness", fractions=[0.01])
    np.testing.assert_array_equal(*(t.per_text["globenc", "comprehensiveness"] for t in (table, again)))


def test_single_units_are_skipped_and_counted():
    row = evaluate(methods="globenc", metrics="sufficiency").rows[0]
    assert (row["n"], row["skipped"]) == (5, 1)
    row = evaluate(["a", "b"], methods="globenc", metrics="sufficiency").rows[0]
    assert row["n"] == 0 and np.isnan([row["mean"], row["low"], row["high"]]).all()


def timeless(table):
    return [{name: value for name, value in row.items() if name != "seconds_per_text"} for row in table.rows]


def test_the_seed_reproduces_the_table():
    changes = dict(texts=TEXTS[:2], methods="all", metrics="all", seed=5)
    table = evaluate(**changes)
    assert str(timeless(table)) == str(timeless(evaluate(**changes)))
    # In double precision the size of a batch changes the last digits alone.
    other = evaluate(**changes, batch_tokens=32)
    for key, values in table.per_text.items():
        np.testing.assert_allclose(values, other.per_text[key], atol=1e-9)
    assert str(timeless(table)) != str(timeless(evaluate(**changes | {"seed": 6})))


def test_the_target_is_the_predicted_or_given_class():
    predicted = [
        int(run(tiny.classifier(), tiny.tokenizer()(text, truncation=False)["input_ids"]).argmax())
        for text in TEXTS
    ]
    columns = [
        evaluate(methods="transformer-attribution", metrics="comprehensiveness", **changes).per_text[
            "transformer-attribution", "comprehensiveness"
        ]
        for changes in ({}, {"target": "label", "labels": predicted}, {"target": 0}, {"target": "GOOD"})
    ]
    np.testing.assert_array_equal(columns[0], columns[1])
    for index, target in enumerate(predicted):
        assert columns[2 + target][index] == columns[0][index] or np.isnan(columns[0][index])


def test_equal_copies_run_once():
    table = evaluate()
    passes = table.info["forward_passes"]
    # Five texts; per method: three metrics of 5 copies, one of 5, two of 9.
    assert passes["asked"] == 5 * len(METHODS) * (4 * 5 + 2 * 9)
    assert passes["done"] < passes["asked"] / 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(methods="globnec"), "methods must be 'all' or of raw-attention"),
        (dict(metrics="compr"), "metrics must be 'all' or of comprehensiveness"),
        (dict(methods=()), "methods is empty"),
        (dict(fractions=(0.0, 0.5)), "fractions must lie above 0"),
        (dict(fractions=()), "fractions must lie above 0"),
        (dict(fractions=(1.5,)), "fractions must lie above 0"),
        (dict(remove="erase"), "remove must be one of mask, delete, pad"),
        (dict(labels=[0, 1]), "labels must hold one label for each of 6 texts, got 2"),
        (dict(labels=[0, 1, 2, 0, 0, 0]), r"a class must lie in \[0, 2\), got 2"),
        (dict(labels=["GOOD", "FINE", "BAD", "BAD", "BAD", "BAD"]), "a class must be of BAD, GOOD"),
        (dict(target="label"), "needs labels"),
        (dict(target=2), r"a class must lie in \[0, 2\)"),
        (dict(bootstrap=-1), "bootstrap must be at least 0"),
        (dict(batch_tokens=0), "batch_tokens must be at least 1"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(long="windows"), "long must be error or truncate"),
        (dict(protocol="erasure"), "protocol must be one of"),
        (dict(protocol="eraser", target=1), "protocol 'eraser' needs target=None, got 1"),
        (dict(protocol="eraser", fractions=(0.5,)), "protocol 'eraser' needs fractions="),
        (dict(texts=["a " * 60]), "at most 40 fit"),
        (dict(texts=["good", ""]), "evaluate: text 2 is empty"),
        (dict(texts=[]), "there is no text"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**changes)


def test_models_and_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tokenizer isn't the model's: token id 69, and the model has 60"):
        evaluate(model=build("bert-classifier", vocab_size=60))
    model = build("bert-classifier")
    model.bert.encoder.layer[1].train()
    model.bert.encoder.layer[1].output.dropout.p = 0.1
    with pytest.raises(ValueError, match="training mode"):
        evaluate(model=model, methods="random")
    with pytest.raises(TypeError, match="texts must be a list of strings, got str"):
        evaluate("the film")


def test_heads_without_classes_are_refused():
    regression = build("bert-classifier", num_labels=1)
    with pytest.raises(ValueError, match="comprehensiveness needs .*; the head of Bert.* is a regression"):
        evaluate(model=regression, metrics="comprehensiveness", methods="globenc")
    with pytest.raises(ValueError, match="needs .*; BertModel has no head"):
        evaluate(model=build("bert"), methods="globenc")
    with pytest.raises(ValueError, match="no metric is left"):
        evaluate(model=regression, methods="globenc", metrics="all")
    with pytest.raises(ValueError, match="target and labels need classes"):
        evaluate(model=regression, methods="globenc", labels=[0] * 6)


def test_all_leaves_out_what_refuses_the_model(monkeypatch):
    def refuse(self, method, examples, progress):
        if method != "random":
            raise ValueError(f"explain: {method} refuses")
        return attribute(self, method, examples, progress)

    attribute = Attributor.attribute
    monkeypatch.setattr(Attributor, "attribute", refuse)
    table = evaluate(methods="all", metrics="sufficiency")
    assert [row["method"] for row in table.rows] == ["random"]
    assert "globenc is left out: globenc refuses." in table.notes
    with pytest.raises(ValueError, match="globenc refuses"):
        evaluate(methods=["globenc", "random"])


def test_texts_that_a_method_refuses_are_left_out_and_counted(monkeypatch):
    own = Runner.run

    def some(self, texts, *rest):
        if self.method.name == "globenc" and any(text.text == TEXTS[0] for text in texts):
            raise ValueError("explain: no film")
        return own(self, texts, *rest)

    monkeypatch.setattr(Runner, "run", some)
    table = evaluate(metrics="sufficiency", methods=["globenc", "lrp"])
    assert [row["n"] for row in table.rows] == [4, 5]
    assert "globenc refuses 1 texts, the first one because no film." in table.notes


def test_a_folder_keeps_finished_steps(tmp_path, monkeypatch):
    table = evaluate(output=tmp_path)
    monkeypatch.setattr(Attributor, "attribute", None)
    monkeypatch.setattr(forwards, "measure", None)
    assert evaluate(output=tmp_path).rows == table.rows
    monkeypatch.undo()
    for changes, name in ((dict(seed=1), "settings.seed"), (dict(texts=TEXTS[:5]), "input.texts")):
        with pytest.raises(ValueError, match=f"another job was started here .*{name}"):
            evaluate(output=tmp_path, **changes)
    with pytest.raises(ValueError, match="model.sha256"):
        evaluate(output=tmp_path, model=roberta())


def test_damaged_steps_are_computed_again(tmp_path):
    table = evaluate(output=tmp_path)
    for number, path in enumerate(sorted((tmp_path / "steps").iterdir())):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if number % 2 else data.replace(b"\x00", b"\x01"))
    assert str(timeless(evaluate(output=tmp_path))) == str(timeless(table))


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import tiny, torch
from pyglobenc.evaluate import evaluate, kept, run
torch.set_num_threads(1)
run.PORTION, write, left = {portion}, kept.write_file, [{steps}]
def last(*args, **options):
    write(*args, **options)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
kept.write_file = last
evaluate(tiny.classifier(), tiny.tokenizer(), {texts!r}, output={folder!r}, **{settings!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 6])
def test_killed_and_restarted_gives_the_same_table(tmp_path, monkeypatch, steps):
    portion = 1500
    monkeypatch.setattr(run_module, "PORTION", portion)
    settings = SETTINGS | {"metrics": list(FAITHFULNESS), "methods": list(METHODS)}
    path = [str(Path(__file__).parents[2]), *(p for p in sys.path if "support" in p)]
    told = dict(path=path, portion=portion, steps=steps, texts=TEXTS, folder=str(tmp_path), settings=settings)
    done = subprocess.run([sys.executable, "-c", KILLED.format(**told)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "steps").glob("*.npz"))) == steps
    table = evaluate(output=tmp_path, **settings)
    assert len(list((tmp_path / "steps").glob("part-*.npz"))) > 2
    assert str(timeless(table)) == str(timeless(evaluate(**settings)))


def test_every_metric_has_a_summary():
    assert all(name == metric.name and metric.summary for name, metric in METRICS.items())


def test_evaluate_stays_a_function():
    importlib.import_module("pyglobenc.evaluate.table")
    assert callable(pyglobenc.evaluate)

"""Metrics against human highlights: cases computed by hand, a plain loop, and scikit-learn as oracle."""

import numpy as np
import pytest
from sklearn.metrics import auc, f1_score, precision_recall_curve
from tiny import classifier, tokenizer

import pyglobenc
from pyglobenc.evaluate.metrics.rationales import (
    auprc,
    count_of_words,
    highlighted,
    iou_f1,
    overlapping,
    precision_recall_f1,
    split_words,
    word_scores,
)

NAN = np.nan


@pytest.fixture
def classes():
    return classifier(), tokenizer()


@pytest.mark.parametrize(
    "text, words",
    [
        ("a dull\u00a0film .\n", ["a", "dull", "film", "."]),
        ("  don't! ", ["don't!"]),
        ("映画は good でした", ["映", "画", "は", "good", "で", "し", "た"]),
        (" \n", []),
    ],
)
def test_words_stand_between_white_space(text, words):
    assert [text[slice(*span)] for span in split_words(text)] == words


def test_spans_touch_words_as_a_plain_loop_says():
    words = split_words("a deep  and meaningful film")
    for start in range(27):
        for stop in range(start, 28):
            plain = [i for i, (low, high) in enumerate(words) if max(low, start) < min(high, stop)]
            assert list(overlapping(words, start, stop)) == plain
    assert highlighted(words, [(2, 3), (3, 11), (2, 4), (6, 8)]) == [range(1, 2), range(1, 3)]


def test_a_word_has_the_highest_score_of_its_tokens():
    words = split_words("unbelievable film , cut off")
    # The token " film" begins with the space, and the special token has no characters.
    offsets = [(0, 0), (0, 2), (2, 7), (7, 12), (12, 17), (18, 19), (20, 23)]
    scores = np.array([9, 0.5, -1, 0.75, -2, NAN, 1])
    np.testing.assert_array_equal(word_scores(words, offsets, scores), [0.75, -2, NAN, 1, NAN])


@pytest.mark.parametrize("top_k, count", [(None, 2), (3, 3), (200, 200), (0.07, 7), (0.061, 7), (0.001, 1)])
def test_the_number_of_selected_words(top_k, count):
    assert count_of_words(top_k, np.arange(100) < 2) == count


def test_f1_equals_scikit_learn_and_is_0_without_hits():
    generator = np.random.default_rng(0)
    for _ in range(50):
        selected, truth = generator.random((2, 9)) < 0.4
        found = precision_recall_f1((selected & truth).sum(), selected.sum(), truth.sum())
        assert found[""] == pytest.approx(f1_score(truth, selected, zero_division=0), abs=1e-15)
    assert precision_recall_f1(0, 0, 0) == {"": 0.0, "precision": 0.0, "recall": 0.0}


def test_auprc_equals_scikit_learn_with_ties_and_unread_words():
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 40):
        for _ in range(25):
            scores, truth = generator.integers(-3, 3, size).astype(float), generator.random(size) < 0.3
            truth[generator.integers(size)] = True
            precision, recall, _ = precision_recall_curve(truth, scores)
            assert auprc(scores, truth) == pytest.approx(auc(recall, precision), abs=1e-12)
            unread = generator.random(size) < 0.3
            lowest = np.where(unread, -9, scores)
            precision, recall, _ = precision_recall_curve(truth, lowest)
            assert auprc(np.where(unread, NAN, scores), truth) == pytest.approx(auc(recall, precision))


def test_auprc_by_hand():
    # After each word, precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: areas 1/2 and (1/2 + 2/3) / 2 / 2.
    assert auprc(np.array([3.0, 2, 1]), np.array([True, False, True])) == pytest.approx(1 / 2 + 7 / 24)
    # All words tie: the only point has precision 1/4 at recall 1.
    assert auprc(np.zeros(4), np.arange(4) == 1) == pytest.approx((1 + 1 / 4) / 2)


def plain_iou_f1(selected, spans):
    """ERASER's partial match, over sets of positions."""
    runs, current = [], set()
    for position, chosen in enumerate([*selected, False]):
        if chosen:
            current.add(position)
        elif current:
            runs, current = [*runs, current], set()
    hits = 0
    for run in runs:
        best = max(len(run & set(span)) / len(run | set(span)) for span in spans)
        hits += best >= 0.5
    return hits, len(runs), len(spans)


def test_iou_f1_equals_a_plain_loop():
    generator = np.random.default_rng(0)
    for _ in range(100):
        selected = generator.random(12) < 0.5
        starts = generator.choice(12, 3, replace=False)
        spans = list({range(start, start + int(generator.integers(1, 5))) for start in starts})
        assert iou_f1(selected, spans) == precision_recall_f1(*plain_iou_f1(selected, spans))


def test_iou_f1_by_hand():
    # Runs: words 1 to 2 and word 5. The first matches the span of words 1 to 4 with 2/4, the second nothing.
    selected = np.isin(np.arange(8), [1, 2, 5])
    assert iou_f1(selected, [range(1, 5), range(6, 8)]) == {"": 0.5, "precision": 0.5, "recall": 0.5}
    assert iou_f1(selected, [range(1, 6)])["precision"] == 0.0
    assert iou_f1(np.zeros(8, dtype=bool), [range(2)])[""] == 0.0


TEXTS = ["a deep film. the ending is good!", "dull", "good, the film is deep and the plot is quick"]


def test_evaluate_joins_tokens_to_words(classes):
    """A plain loop over the attributions, one text at a time."""
    rationales = [[(2, 11), (27, 31)], None, [(5, 14), (5, 14), (35, 38)]]
    metrics = ("token-f1", "auprc", "iou-f1")
    model, tokenizer = classes
    table = pyglobenc.evaluate(
        model, tokenizer, TEXTS, methods=("globenc", "random"), metrics=metrics, rationales=rationales
    )
    for index in (0, 2):
        words = TEXTS[index].split()
        found = pyglobenc.explain(model, tokenizer, TEXTS[index])
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        scores, truth = np.zeros(len(words)), np.zeros(len(words), dtype=bool)
        for word, (start, name) in enumerate(zip(starts, words, strict=False)):
            own = [
                score
                for score, special, (low, high) in zip(
                    found.scores, found.special, found.offsets, strict=True
                )
                if not special and low >= start and high <= start + len(name)
            ]
            scores[word] = max(own)
            truth[word] = any(low < start + len(name) and high > start for low, high in rationales[index])
        top = np.argsort(-scores)[: truth.sum()]
        precision, recall, _ = precision_recall_curve(truth, scores)
        chosen = np.isin(np.arange(len(words)), top)
        spans = [range(1, 3), range(6, 7)] if index == 0 else [range(1, 3), range(7, 8)]
        hits, runs, true = plain_iou_f1(chosen, spans)
        expected = {
            "token-f1": truth[top].mean(),
            "token-f1.precision": truth[top].mean(),
            "auprc": auc(recall, precision),
            "iou-f1": 2 * hits / (runs + true),
            "iou-f1.recall": hits / true,
        }
        for name, value in expected.items():
            assert table.per_text["globenc", name][index] == pytest.approx(value, abs=1e-6), name
    assert all(np.isnan(values[1]) for values in table.per_text.values())
    assert {row["n"] for row in table.rows} == {2}


def test_words_beyond_the_cut_count_in_the_recall(classes):
    model, tokenizer = classes
    text = "deep film " + "x " * 30
    options = dict(methods=("globenc",), metrics=("token-f1", "auprc"), long="truncate", max_length=10)
    beyond = [(text.index("x") + 40, text.index("x") + 41)]
    table = pyglobenc.evaluate(model, tokenizer, [text], rationales=[[(0, 4), *beyond]], top_k=8, **options)
    # The 8 tokens that are read are 8 words; one of the two highlighted words is among them.
    values = {name: values[0] for (_, name), values in table.per_text.items()}
    assert values["token-f1.recall"] == 0.5 and values["token-f1.precision"] == 1 / 8
    alone = pyglobenc.evaluate(model, tokenizer, [text], rationales=[beyond], **options)
    # All unread words come last, together: 1 of 32 words is right, after the first point's precision of 0.
    assert alone.per_text["globenc", "auprc"][0] == pytest.approx(1 / 32 / 2)
    assert alone.per_text["globenc", "token-f1"][0] == 0


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "the metric auprc needs rationales"),
        ({"rationales": "ab"}, TypeError, "rationales must be a list of one list for each text, got str"),
        ({"rationales": [[]]}, ValueError, "there are 2 texts and 1 rationales"),
        ({"rationales": [[], 3]}, TypeError, "rationale of text 2 must be a list or None, got 3"),
        ({"rationales": [[(0, 1)], [(0,)]]}, TypeError, r"rationale of text 2 must hold pairs"),
        ({"rationales": [[(0, 1.0)], []]}, TypeError, r"rationale of text 1 must hold pairs"),
        ({"rationales": [[(0, 10)], []]}, ValueError, r"text 1 has the span \(0, 10\), which doesn't lie in"),
        ({"rationales": [[(1, 1)], []]}, ValueError, r"text 1 has the span \(1, 1\)"),
        ({"rationales": [[], []], "top_k": 0}, ValueError, "top_k must be a number of words, at least 1"),
        ({"rationales": [[], []], "top_k": 1.0}, ValueError, "as a float between 0 and 1, got 1.0"),
        ({"rationales": [[], []], "top_k": True}, TypeError, "top_k must be a number or None, got True"),
    ],
)
def test_evaluate_refuses_what_are_no_rationales(classes, options, error, message):
    with pytest.raises(error, match=f"evaluate: .*{message}"):
        pyglobenc.evaluate(*classes, ["a film", "deep"], methods=("random",), metrics=("auprc",), **options)

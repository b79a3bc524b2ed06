"""Metrics against human highlights: cases computed by hand, a plain loop, and scikit-learn as oracle."""

import numpy as np
import pytest
from sklearn.metrics import auc, f1_score, precision_recall_curve
from pyglobenc.evaluate.rationales import (
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

"""Compares attributions with the words that people marked as the reason for a label.

These metrics count the words of a text, whatever its tokens are. A word is what stands between white space;
in scripts without spaces each character is a word. A word's score is the highest score of its tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import ceil

import numpy as np

from pyglobenc.inputs.words import unspaced

Span = tuple[int, int]
# A run of words matches a highlighted span if their intersection is at least this share of their union.
IOU_THRESHOLD = 0.5


def split_words(text: str) -> list[Span]:
    """Return the characters (start, stop) of each word of a text, ascending."""
    words: list[Span] = []
    joins = False
    for i, char in enumerate(text):
        alone = unspaced(char)
        if not char.isspace():
            start = words.pop()[0] if joins and not alone else i
            words.append((start, i + 1))
        joins = not (alone or char.isspace())
    return words


def overlapping(words: Sequence[Span], start: int, stop: int) -> range:
    """Return the numbers of the words that share a character with [start, stop); words are ascending."""
    first = bisect_right(words, start, key=lambda word: word[1])
    end = first
    while start < stop and end < len(words) and words[end][0] < stop:
        end += 1
    return range(first, end)


def word_scores(words: Sequence[Span], offsets: Sequence[Span], scores: np.ndarray) -> np.ndarray:
    """Return the highest score of each word's tokens.

    Args:
        words: W pairs (start, stop) of characters, ascending.
        offsets: the characters of n tokens.
        scores: (n,) float64. NaN leaves a token out.

    Returns:
        (W,) float64, NaN for a word without tokens: it lies beyond the cut, or all its tokens are left out.
    """
    found = np.full(len(words), np.nan)
    for span, score in zip(offsets, scores, strict=True):
        for word in overlapping(words, *span):
            found[word] = np.fmax(found[word], score)
    return found


def highlighted(words: Sequence[Span], rationale: Sequence[Span]) -> list[range]:
    """Return the numbers of the words that each highlighted span touches, without duplicates."""
    touched = (overlapping(words, *span) for span in rationale)
    return list(dict.fromkeys(numbers for numbers in touched if numbers))


def count_of_words(top_k: int | float | None, truth: np.ndarray) -> int:
    """Return how many words of a text are selected.

    Args:
        top_k: a number of words; a share of the text's words, below 1, which is rounded up; or None for as
            many words as the text's highlights hold.
        truth: (W,) bool, the highlighted words.
    """
    if top_k is None:
        return int(truth.sum())
    # A product such as 0.07 * 100 may lie above the whole number that it stands for.
    return max(1, ceil(round(top_k * len(truth), 9))) if isinstance(top_k, float) else top_k


def precision_recall_f1(hits: float, selected: float, true: float) -> dict[str, float]:
    """Return precision, recall and, at "", their harmonic mean; a quotient by 0 is 0."""
    precision, recall = (hits / count if count else 0.0 for count in (selected, true))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"": f1, "precision": precision, "recall": recall}


def auprc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the area under the precision-recall curve, by the trapezoidal rule as in ERASER's script.

    It equals scikit-learn's `auc` of its `precision_recall_curve`, and may differ from its
    `average_precision_score`. Words of the same score enter the curve together.

    Args:
        scores: (W,) float64. Words with NaN come last, all together.
        truth: (W,) bool, at least one of them True.
    """
    # Ranks from 0 for the highest score; NaN is the largest number to NumPy.
    ranks = np.unique(-scores, return_inverse=True)[1]
    order = np.argsort(ranks, kind="stable")
    # The curve has a point after the last word of each rank.
    last = np.flatnonzero(np.append(np.diff(ranks[order]), 1))
    hits = np.cumsum(truth[order])[last]
    precision, recall = np.append(1, hits / (last + 1)), np.append(0, hits / truth.sum())
    return float(((precision[1:] + precision[:-1]) / 2 * np.diff(recall)).sum())


def iou_f1(selected: np.ndarray, spans: Sequence[range]) -> dict[str, float]:
    """Return precision, recall and F1 of the runs of selected words, as ERASER matches them with spans.

    A run counts as right if some span has an intersection over union of at least IOU_THRESHOLD with it.

    Args:
        selected: (W,) bool.
        spans: the highlighted spans, each a range of words, without duplicates.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], selected, [False]))))
    runs = [range(start, stop) for start, stop in edges.reshape(-1, 2)]
    hits = sum(any(_iou(run, span) >= IOU_THRESHOLD for span in spans) for run in runs)
    return precision_recall_f1(hits, len(runs), len(spans))


def _iou(one: range, other: range) -> float:
    shared = max(0, min(one.stop, other.stop) - max(one.start, other.start))
    return shared / (len(one) + len(other) - shared)

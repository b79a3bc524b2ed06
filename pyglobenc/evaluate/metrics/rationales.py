"""Compares attributions with the words that people marked as the reason for a label.

These metrics count the words of a text, whatever its tokens are. A word is what stands between white space;
in scripts without spaces each character is a word. A word's score is the highest score of its tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyglobenc.evaluate.examples import KEPT, Example, Marked, Metric, Scores, Settings, Span, ranked
from pyglobenc.evaluate.metrics.perturbation import count_of
from pyglobenc.inputs.words import unspaced

if TYPE_CHECKING:
    from pyglobenc.inputs.windows import Encoded

NEEDS = frozenset({"rationales"})
# The published evaluation on movie reviews selects so many words.
MOVIE_WORDS = tuple(range(5, 85, 5))
# F1 over all texts together is the sum of the first counts, divided by the sum of the second ones.
MICRO = (("twice-the-right", "selected-and-highlighted"),)
# A run of words matches a highlighted span if their intersection is at least this share of their union.
IOU_THRESHOLD = 0.5


def check_top_k(top_k: Any) -> None:
    """Raise TypeError or ValueError unless top_k is a number of words, a share of them, or None."""
    if top_k is None:
        return
    if type(top_k) not in (int, float):
        raise TypeError(f"evaluate: top_k must be a number or None, got {top_k!r}")
    if not (top_k >= 1 if type(top_k) is int else 0 < top_k < 1):
        raise ValueError(
            f"evaluate: top_k must be a number of words, at least 1, or a share of them as a float between 0 "
            f"and 1, got {top_k!r}"
        )


def with_rationales(
    examples: Sequence[Example], rationales: Any, unknown_id: int | None
) -> Sequence[Example]:
    """Check the highlights of all texts, and return the examples with them.

    Args:
        examples: N texts.
        rationales: for each text, pairs (start, stop) of characters, or None for a text without highlights;
            or None for all texts.
        unknown_id: the id of the tokenizer's unknown token, or None.

    Returns:
        N examples; `Example.rationale` is None without highlights.

    Raises:
        TypeError, ValueError: as `checked_spans`.
    """
    return [
        replace(one, rationale=_mark(one.encoded, spans, unknown_id)) if spans else one
        for one, spans in zip(examples, checked_spans(examples, rationales, "rationales"), strict=True)
    ]


def _mark(encoded: Encoded, rationale: Sequence[Span], unknown_id: int | None) -> Marked | None:
    """Return the highlights of one text by words; None if they touch no word."""
    words = split_words(encoded.text)
    spans = highlighted(words, rationale)
    truth = np.zeros(len(words), dtype=bool)
    for span in spans:
        truth[span.start : span.stop] = True
    unknown = np.equal(encoded.inputs["input_ids"], -1 if unknown_id is None else unknown_id)
    return Marked(words, spans, truth, unknown) if spans else None


def checked_spans(examples: Sequence[Example], given: Any, what: str) -> list[list[Span]]:
    """Check the spans of characters that a user gave for each text, and return them.

    Args:
        examples: N texts.
        given: for each text, pairs (start, stop) of characters, or None; or None for all texts.
        what: name of the argument for messages.

    Returns:
        N lists of pairs.

    Raises:
        TypeError, ValueError: there are fewer or more entries than texts; a span isn't a pair of integers, or
            lies outside its text; a text is a pair of texts; or the tokenizer doesn't tell the characters of
            its tokens. The message names the text.
    """
    if given is None:
        return [[] for _ in examples]
    if not _is_list(given):
        raise TypeError(
            f"evaluate: {what} must be a list of one list for each text, got {type(given).__name__}"
        )
    if len(given) != len(examples):
        raise ValueError(f"evaluate: there are {len(examples)} texts and {len(given)} {what}")
    return [
        [] if spans is None else _checked(one.encoded, spans, f"{what[:-1]} of text {number}", what)
        for number, (one, spans) in enumerate(zip(examples, given, strict=True), 1)
    ]


def _checked(encoded: Encoded, spans: Any, name: str, what: str) -> list[Span]:
    if encoded.text_pair is not None:
        raise ValueError(f"evaluate: {name} belongs to a pair of texts; {what} are for single texts")
    if encoded.offsets is None:
        raise ValueError(f"evaluate: {what} need a fast tokenizer, which knows its tokens' characters")
    if not _is_list(spans):
        raise TypeError(f"evaluate: {name} must be a list or None, got {spans!r}")
    for span in spans:
        if not _is_list(span) or len(span) != 2 or not all(_is_integer(number) for number in span):
            raise TypeError(f"evaluate: {name} must hold pairs (start, stop) of characters, got {span!r}")
        if not 0 <= span[0] < span[1] <= len(encoded.text):
            raise ValueError(
                f"evaluate: {name} has the span ({span[0]}, {span[1]}), which doesn't lie in the text's "
                f"{len(encoded.text)} characters"
            )
    return [(int(start), int(stop)) for start, stop in spans]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


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
    return count_of(top_k, len(truth)) if isinstance(top_k, float) else top_k


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


def _words(example: Example, scores: Scores, movies: bool = False) -> np.ndarray:
    """Return the scores of an example's words (W,); NaN for words that aren't ranked.

    Special tokens count for no word, nor does the token that the head reads. As published for movie reviews,
    unknown tokens don't count either, and negative scores are set to 0.
    """
    marked = example.rationale
    left_out = (example.units == KEPT) | (marked.unknown if movies else False)
    tokens = np.where(left_out, np.nan, scores.tokens.clip(min=0) if movies else scores.tokens)
    return word_scores(marked.words, example.encoded.offsets, tokens)


def _top(example: Example, words: np.ndarray, count: int, settings: Settings) -> np.ndarray:
    """Return (W,) bool, True for the words with the highest scores; equal scores are in random order."""
    order, top = ranked(words, (settings.seed, example.index)), np.zeros(len(words), dtype=bool)
    top[order[: min(count, int(np.count_nonzero(~np.isnan(words))))]] = True
    return top


def token_f1(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> Any:
    """Return F1, precision and recall of the highest words against the highlighted ones."""
    if (marked := example.rationale) is None:
        return dict.fromkeys(("", "precision", "recall"), np.nan)
    count = count_of_words(settings.top_k, marked.truth)
    top = _top(example, _words(example, scores), count, settings)
    return precision_recall_f1((top & marked.truth).sum(), top.sum(), marked.truth.sum())


def iou(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> Any:
    """Return F1, precision and recall of the runs of the highest words against the highlighted spans."""
    if (marked := example.rationale) is None:
        return dict.fromkeys(("", "precision", "recall"), np.nan)
    count = count_of_words(settings.top_k, marked.truth)
    return iou_f1(_top(example, _words(example, scores), count, settings), marked.spans)


def area(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> float:
    """Return the area under the precision-recall curve of an example's words."""
    if (marked := example.rationale) is None:
        return np.nan
    return auprc(_words(example, scores), marked.truth)


def movie_counts(example: Example, scores: Scores, settings: Settings) -> dict[int, tuple[int, int, int]]:
    """Return for each of MOVIE_WORDS the number of right words, of selected and of highlighted ones."""
    words, truth, found = _words(example, scores, movies=True), example.rationale.truth, {}
    for count in MOVIE_WORDS:
        top = _top(example, words, count, settings)
        found[count] = int((top & truth).sum()), int(top.sum()), int(truth.sum())
    return found


def movie_f1(
    example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Return F1 of the highest words for each of MOVIE_WORDS, and their mean at ""."""
    if example.rationale is None:
        return dict.fromkeys(("", *map(str, MOVIE_WORDS)), np.nan)
    counts = movie_counts(example, scores, settings)
    found = {str(count): precision_recall_f1(*counts[count])[""] for count in MOVIE_WORDS}
    return {"": float(np.mean(list(found.values())))} | found


def movie_micro_f1(count: int) -> Callable[..., dict[str, float]]:
    """Return the value of a metric: F1 of `count` words at "", and the counts that MICRO names."""

    def value(
        example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings
    ) -> dict[str, float]:
        if example.rationale is None:
            return dict.fromkeys(("", *MICRO[0]), np.nan)
        hits, selected, true = movie_counts(example, scores, settings)[count]
        return dict(
            zip(("", *MICRO[0]), (2 * hits / (selected + true), 2 * hits, selected + true), strict=True)
        )

    return value


METRICS = (
    Metric(
        "token-f1",
        "F1 of the highest words against human highlights (DeYoung et al., 2020); higher is better",
        token_f1,
        needs=NEEDS,
    ),
    Metric(
        "auprc",
        "area under the precision-recall curve against human highlights (DeYoung et al., 2020)",
        area,
        needs=NEEDS,
    ),
    Metric(
        "iou-f1",
        "F1 of runs of the highest words that overlap a highlighted span by half (DeYoung et al., 2020)",
        iou,
        needs=NEEDS,
    ),
)
# As published for ERASER's movie reviews: scores below 0 count as 0, and unknown tokens don't count.
PUBLISHED = (
    Metric(
        "token-f1",
        "F1 of the highest 5, 10 to 80 words against human highlights, as a mean over texts (Chefer et al., "
        "2021)",
        movie_f1,
        needs=NEEDS,
    ),
    *(
        Metric(
            f"token-f1-micro-{count}",
            f"F1 of the highest {count} words, with the words of all texts counted together (Chefer et al., "
            "2021)",
            movie_micro_f1(count),
            needs=NEEDS,
            ratios=MICRO,
        )
        for count in MOVIE_WORDS
    ),
)

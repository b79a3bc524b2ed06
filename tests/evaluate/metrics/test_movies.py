"""The published evaluation on movie reviews equals a plain loop over words and characters."""

import numpy as np
import pytest
import torch
from models import build
from sklearn.metrics import f1_score
from tiny import tokenizer

import pyglobenc

SIZES = range(5, 85, 5)
WORDS = ["deep", "good.", "the", "film", "xyz", "\u00a7", "dull!", "plot", "a", "bad"]


def reviews() -> tuple[list[str], list[list[tuple[int, int]]], list[int]]:
    """Two long reviews, the second one beyond the cut, and a short one; highlights, and labels."""
    generator, texts, rationales = np.random.default_rng(0), [], []
    for size in (90, 300, 30):
        words = generator.choice(WORDS, size)
        text, spans = " ".join(words), []
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        for first in generator.choice(size - 4, 6, replace=False):
            spans.append((int(starts[first]), int(starts[first + 4] - 1)))
        texts.append(text)
        rationales.append(spans)
    return texts, rationales, [0, 1, 1]


def word_scores(found, text: str) -> np.ndarray:
    """The highest clamped score of the pieces of each word, by characters; NaN without a known piece."""
    of_character = np.full(len(text), np.nan)
    for score, token, special, (start, stop) in zip(
        found.scores, found.tokens, found.special, found.offsets, strict=True
    ):
        if not special and token != "[UNK]":
            of_character[start:stop] = max(score, 0)
    scores, start = [], 0
    for word in text.split():
        own = of_character[start : start + len(word)]
        scores.append(np.nan if np.isnan(own).all() else np.nanmax(own))
        start += len(word) + 1
    return np.array(scores)


@pytest.mark.parametrize("method", ["transformer-attribution", "lrp", "attention-rollout"])
def test_movies_equal_a_plain_loop(method):
    model, names = build("bert-classifier", max_position_embeddings=512), tokenizer()
    texts, rationales, labels = reviews()
    table = pyglobenc.evaluate(
        model,
        names,
        texts,
        methods=(method,),
        rationales=rationales,
        labels=labels,
        protocol="chefer-movies",
        progress=False,
    )
    shown = table.rows[0]["method"]
    # The published default for BERT-base is the last layer alone.
    last = method == "transformer-attribution"
    assert shown == ("transformer-attribution-last" if last else method)
    pooled = {size: ([], []) for size in SIZES}
    for index, (text, spans, label) in enumerate(zip(texts, rationales, labels, strict=True)):
        options = dict(long="truncate", max_length=512, progress=False)
        if method != "attention-rollout":
            options |= dict(target=label, dtype=torch.float64)
        found = pyglobenc.explain(model, names, text, shown, **options)
        assert bool(found.cut) == (index == 1)
        scores, start, truth = word_scores(found, text), 0, []
        for word in text.split():
            stop = start + len(word)
            truth.append(any(low < stop and high > start for low, high in spans))
            start = stop + 1
        ranking = [i for i in np.argsort(-scores, kind="stable") if not np.isnan(scores[i])]
        for size in SIZES:
            selected = np.isin(np.arange(len(truth)), ranking[:size])
            tie = size < len(ranking) and scores[ranking[size - 1]] == scores[ranking[size]]
            if not tie:
                value = table.per_text[shown, f"token-f1.{size}"][index]
                assert value == pytest.approx(f1_score(truth, selected), abs=1e-12)
            pooled[size][0].extend(truth)
            pooled[size][1].extend(selected)
    if not last:
        return
    rows = {row["metric"]: row for row in table.rows}
    for size in SIZES:
        expected = f1_score(*pooled[size])
        assert rows[f"token-f1-micro-{size}"]["mean"] == pytest.approx(expected, abs=1e-12)
        of_texts = table.per_text[shown, f"token-f1.{size}"]
        assert rows[f"token-f1.{size}"]["mean"] == pytest.approx(of_texts.mean())
    # Highlighted words beyond the cut can't be found, so no F1 of the second text reaches 1.
    assert table.per_text[shown, "token-f1.80"][1] < 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"labels": None}, "labels"),
        ({"rationales": None}, "rationales"),
        ({"max_length": 300}, "protocol 'chefer-movies' needs max_length=512, got 300"),
        ({"target": 1}, "protocol 'chefer-movies' needs target='label', got 1"),
    ],
)
def test_movies_refuse_other_settings(options, message):
    texts, rationales, labels = reviews()
    given = dict(labels=labels, rationales=rationales, protocol="chefer-movies", methods=("random",))
    model = build("bert-classifier", max_position_embeddings=512)
    with pytest.raises(ValueError, match=f"evaluate: .*{message}"):
        pyglobenc.evaluate(model, tokenizer(), texts, progress=False, **given | options)

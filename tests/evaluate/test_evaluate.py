"""The metrics equal plain loops over one text at a time, without batches."""

import importlib
from math import ceil

import numpy as np
import pytest
import torch
from tiny import classifier, tokenizer

import pyglobenc

TEXTS = [
    "the film is good.",
    "deep the",
    "bad film, deep good?",
    "a",
    "the deep film & the good film!",
    "good",
]
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)


def probability(model, ids: list[int], target: int) -> float:
    """The probability of a class for the plain model."""
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits.softmax(-1)[0, target])


@pytest.mark.parametrize("method", ["globenc", "attention-rollout", "transformer-attribution"])
def test_equals_a_plain_loop(method):
    model, names = classifier(), tokenizer()
    table = pyglobenc.evaluate(model, names, TEXTS, methods=(method,), fractions=FRACTIONS)
    for index, text in enumerate(TEXTS):
        found = pyglobenc.explain(model, names, text, method)
        ids, places = found.token_ids, [i for i, special in enumerate(found.special) if not special]
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([ids])).logits.softmax(-1)[0]
        target, falls = int(whole.argmax()), {"comprehensiveness": [], "sufficiency": []}
        ranking = sorted(places, key=lambda i: -found.scores[i])
        for fraction in FRACTIONS:
            top = ranking[: max(1, ceil(fraction * len(places)))]
            for metric, removed in (("comprehensiveness", top), ("sufficiency", set(places) - set(top))):
                copy = [names.mask_token_id if i in removed else value for i, value in enumerate(ids)]
                falls[metric].append(float(whole[target]) - probability(model, copy, target))
        for metric, values in falls.items():
            expected = np.nan if len(places) < 2 else np.mean(values)
            np.testing.assert_allclose(table.per_text[method, metric][index], expected, atol=1e-9)


def test_evaluate_stays_a_function():
    importlib.import_module("pyglobenc.evaluate.table")
    assert callable(pyglobenc.evaluate)

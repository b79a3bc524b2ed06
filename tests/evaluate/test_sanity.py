"""Sanity checks: copies of the model with random weights from the top; the model itself stays as it is."""

import hashlib
from copy import deepcopy
from functools import cache, partial

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, IMAGES, PRE_NORM, build
from scipy.stats import spearmanr
from tiny import classifier, tokenizer

import pyglobenc
from pyglobenc.evaluate.attributions import Attributor
from pyglobenc.evaluate.sanity import depths, randomised, rank_correlation

EVERY = {**ARCHITECTURES, **PRE_NORM, **IMAGES}


def fingerprints(model) -> dict[str, str]:
    return {
        name: hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()
        for name, weight in model.named_parameters()
    }


@pytest.mark.parametrize("kind", EVERY)
def test_every_weight_is_randomised_once_from_the_top(kind):
    model = build(kind)
    before, steps = fingerprints(model), depths(model)
    names = [step.name for step in steps]
    layers = [name for name in names if name.startswith("layer")]
    assert sorted(before) == sorted(name for step in steps for name in step.parameters)
    assert layers == sorted(layers, key=lambda name: -int(name.split()[1]))
    assert names == [*(["head"] if names[0] == "head" else []), *layers, "embeddings"]
    # The embeddings are read by the first layer, so they are no part of the head.
    assert not any(
        "embed" in name or "wte" in name for name in (steps[0].parameters if names[0] == "head" else ())
    )
    last = before
    for step, (name, copy) in zip(steps, randomised(model, 0), strict=True):
        now = fingerprints(copy)
        changed = {name for name in now if now[name] != last[name]}
        # Constant tensors, such as biases of 0, stay as they are.
        varied = {n for n in step.parameters if model.get_parameter(n).detach().std(correction=0) > 0}
        assert name == step.name and varied <= changed <= set(step.parameters)
        last = now
    assert fingerprints(model) == before


def test_random_weights_keep_mean_and_deviation_and_follow_the_seed():
    model = build("bert-classifier")
    weights = [[*randomised(model, seed)][-1][1].state_dict() for seed in (0, 0, 1)]
    for name, weight in model.named_parameters():
        assert torch.equal(weights[0][name], weights[1][name])
        if weight.numel() > 1000:
            assert not torch.equal(weights[0][name], weights[2][name])
            deviation = weight.detach().std()
            # The mean and deviation of so many numbers lie within 6 of their standard errors.
            error = 6 * deviation / weight.numel() ** 0.5
            assert abs(weights[0][name].mean() - weight.detach().mean()) < error
            assert abs(weights[0][name].std() - deviation) < error


def test_rank_correlation_equals_scipy():
    generator = np.random.default_rng(0)
    for size in (2, 3, 17):
        one, other = generator.integers(0, 5, (2, size)) + np.array([[0.5], [0]])
        one[0] += 7
        other[-1] -= 7
        assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3)))


TEXTS = ["a deep film", "good, the film is deep", "dull", "the ending is the good one"]
METHODS = ("globenc", "attention-rollout", "transformer-attribution", "random")


def test_evaluate_correlates_scores_of_random_models():
    """A plain loop over `explain`, with the classes that the model itself predicts."""
    model, tokens = classifier(), tokenizer()
    before = fingerprints(model)
    options = dict(methods=METHODS, sanity=True, progress=False, dtype=torch.float64)
    table = pyglobenc.evaluate(model, tokens, TEXTS, **options)
    classes = [
        int(model(**tokens(text, truncation=False, return_tensors="pt")).logits.argmax()) for text in TEXTS
    ]

    def scores(one, text, method, target):
        found = pyglobenc.explain(
            one, tokens, text, method, target=target, dtype=torch.float64, progress=False
        )
        return found.scores[~np.array(found.special)]

    of_the_model = cache(partial(scores, model))
    for number, (_, changed) in enumerate(randomised(model, 0), 1):
        # Nothing is known about a new copy from the steps before.
        copy = deepcopy(changed)
        for method in METHODS[:3]:
            target = classes if method.startswith("transformer") else [None] * len(TEXTS)
            for index, (text, own) in enumerate(zip(TEXTS, target, strict=True)):
                given = (text, method, own)
                expected = spearmanr(of_the_model(*given), scores(copy, *given)).statistic
                value = table.per_text[method, f"sanity.{number}"][index]
                assert value == pytest.approx(expected, abs=1e-6), (method, number, text)
    assert number == 5
    assert not any(method == "random" and row.startswith("sanity") for method, row in table.per_text)
    assert any("sanity.1 the head, sanity.2 the layer 3" in note for note in table.notes)
    assert fingerprints(model) == before
    again = pyglobenc.evaluate(model, tokens, TEXTS, **options)
    for key, values in table.per_text.items():
        np.testing.assert_array_equal(values, again.per_text[key])


def test_the_model_stays_as_it_is_when_the_checks_are_stopped(monkeypatch):
    model = classifier()
    before, flags = fingerprints(model), [weight.requires_grad for weight in model.parameters()]
    calls = []

    def stop(self, method, examples, progress):
        calls.append(method)
        raise KeyboardInterrupt

    def interrupted(self, model):
        monkeypatch.setattr(Attributor, "attribute", stop)
        return self

    monkeypatch.setattr(Attributor, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pyglobenc.evaluate(model, tokenizer(), TEXTS, methods=("globenc",), sanity=True, progress=False)
    assert calls == ["globenc"]
    assert fingerprints(model) == before
    assert [weight.requires_grad for weight in model.parameters()] == flags


def test_finished_checks_are_read_from_the_folder(tmp_path, monkeypatch):
    options = dict(methods=("globenc",), sanity=True, output=tmp_path / "out", progress=False)
    first = pyglobenc.evaluate(classifier(), tokenizer(), TEXTS, **options)

    def fail(*args):
        raise AssertionError("attributed again")

    monkeypatch.setattr(Attributor, "attribute", fail)
    again = pyglobenc.evaluate(classifier(), tokenizer(), TEXTS, **options)
    assert first.per_text.keys() == again.per_text.keys()
    for key, values in first.per_text.items():
        np.testing.assert_array_equal(values, again.per_text[key])

"""The error that a method reports reaches the attribution, and warnings name the texts."""

import warnings

import pytest
import torch
from models import build
from tiny import classifier, tokenizer

import pyglobenc
from pyglobenc import TransformerAttribution
from pyglobenc.methods.precision.reliability import (
    NoRelevanceWarning,
    PrecisionWarning,
    examples_named,
    examples_reordered,
    warn_of_nothing,
    warn_of_precision,
)

TEXTS = ["the good film is deep, filming.", "a film", "good deep"]


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def test_an_attribution_carries_the_error_of_its_method(tmp_path):
    model = build("bert-classifier", torch.float32)
    options = dict(method="transformer-attribution", batch_size=1, progress=False)
    found = pyglobenc.explain(model, tokenizer(), TEXTS, **options)
    for a in found:
        exact = TransformerAttribution(model)(input_ids=torch.tensor([a.token_ids]))
        assert a.error > 0 and a.error == float(exact.error)
    assert all(a.error is None for a in pyglobenc.explain(model, tokenizer(), TEXTS, progress=False))
    for suffix in (".json", ".safetensors"):
        found.save(tmp_path / f"a{suffix}")
        assert [a.error for a in pyglobenc.load(tmp_path / f"a{suffix}")] == [a.error for a in found]


def test_joined_windows_carry_the_largest_error():
    options = dict(method="integrated-gradients", long="windows", max_length=8, progress=False)
    a = pyglobenc.explain(classifier(), tokenizer(), "the good film is deep, filming the film.", **options)
    assert len(a.windows) > 1 and 0 <= a.error <= 1e-2


def told(kind, call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in found if one.category is kind]


def test_warnings_name_the_examples():
    error = torch.tensor([0.5, 0.0001, float("nan"), 0.2])

    def warn():
        warn_of_precision("Who", error, None, "measured", "advice")

    large, unknown = told(PrecisionWarning, warn)
    assert "2 of 4 examples by more than 1% (at worst 50.0%, measured: example 0, example 3); advice" in large
    assert "unknown (measured: example 2)" in unknown
    with examples_named(["text 5", "text 2", "text 5", "text 9"]), examples_reordered([3, 1, 2, 0]):
        large, unknown = told(PrecisionWarning, warn)
    assert "measured: text 9, text 5)" in large and "measured: text 5)" in unknown
    (nothing,) = told(NoRelevanceWarning, lambda: warn_of_nothing("Who", torch.ones(9, dtype=torch.bool)))
    assert "(example 0, example 1, example 2, example 3, example 4 and 4 more)" in nothing


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_explain_names_its_texts(batch_size, packed):
    """Every class has a weight of 0, so no token gets any relevance in any text."""
    from pyglobenc.inputs.batches import Runner
    from pyglobenc.inputs.options import Options
    from pyglobenc.inputs.windows import encode

    model = build("bert-classifier")
    torch.nn.init.zeros_(model.classifier.weight)
    options = Options("transformer-attribution", batch_size=batch_size, packed=packed)
    runner = Runner(model, tokenizer(), options)
    encoded = [encode(tokenizer(), text, "text", 40) for text in TEXTS]
    names = ["record 4", "record 40", "record 400"]
    messages = told(NoRelevanceWarning, lambda: list(runner.run(encoded, names=names)))
    assert len(messages) == 3 // batch_size
    assert all(any(f"{name}," in m or f"{name})" in m for m in messages) for name in names)

"""The registry tells the truth, and the pages that list methods are drawn from it."""

from pathlib import Path

import pytest
import torch
import two_streams
from methods_page import tables
from models import ARCHITECTURES, CAUSAL, IMAGES, PRE_NORM, build, classifier, random_batch
from torch import nn

from pyglobenc.hf.registry import BINDINGS
from pyglobenc.methods.registry import ENCODER_DECODERS, METHODS, MODELS

ROOT = Path(__file__).parents[2]
WITH_A_HEAD = ("Classification", "CausalLM", "LMHeadModel")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*ARCHITECTURES, *PRE_NORM, *IMAGES])
def test_every_yes_runs_and_every_no_gives_its_reason(name):
    stock = build(name)
    headed = type(stock).__name__.endswith(WITH_A_HEAD)
    model = stock if headed else classifier(name, "last" if name in CAUSAL else "first")
    batch = random_batch(stock, batch=2, n=7)
    for method in METHODS.values():
        extra = {}
        if method.replaces_tokens and "input_ids" in batch:
            extra = dict(replacement=0, special_tokens_mask=torch.zeros_like(batch["input_ids"]))
        run = method.run("test", model, "auto", None) if _takes(method, stock) else None
        if run is not None:
            rows = run({**batch, **extra}, None)
            assert torch.isfinite(rows.scores).all(), method.name
            found = (rows.scores != 0).flatten(1).any(1)
            assert found.all() if rows.nothing is None else (found | rows.nothing).all(), method.name
            continue
        with pytest.raises(ValueError, match="this model|no Linear module|share modules"):
            method.run("test", model, "auto", None)({**batch, **extra}, None)


@pytest.mark.parametrize("name", [*two_streams.GENERATORS, "bert-bert"])
def test_encoder_decoders_are_for_the_methods_that_say_so(name):
    model = two_streams.build(name)
    batch = {"input_ids": torch.randint(5, 90, (2, 7))}
    for method in METHODS.values():
        if _takes(method, model):
            rows = method.run("test", model, "auto", None)(batch, None)
            assert torch.isfinite(rows.scores).all() and (rows.scores != 0).any(1).all(), method.name
        else:
            with pytest.raises(ValueError, match="encoder-decoder"):
                method.run("test", model, "auto", None)(batch, None)


def _takes(method, model: nn.Module) -> bool:
    return model.config.model_type in MODELS[method.models]


def test_all_model_types_are_tested():
    tested = {build(name).config.model_type for name in (*ARCHITECTURES, *PRE_NORM, *IMAGES)}
    assert tested == set(BINDINGS)
    two = {two_streams.build(name).config.model_type for name in (*two_streams.GENERATORS, "bert-bert")}
    assert two == set(ENCODER_DECODERS)
    assert all(set(types) <= tested | two for types in MODELS.values())


def test_the_page_of_methods_is_the_registry():
    page = (ROOT / "docs" / "methods.md").read_text()
    for method in METHODS.values():
        facts = (f"a {method.target}", method.models, method.defined_for, method.cost)
        line = f"| {' | '.join((f'`{method.name}`', method.summary, *facts))} |"
        assert line in page, line
    assert page.count("\n| `") == len(METHODS) + 1
    assert page.endswith(tables()), "python tests/support/methods_page.py draws it again"
    for words, types in MODELS.items():
        assert f"- **{words}**: {', '.join(f'`{name}`' for name in types)}." in page, words
    readme = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in readme] == []

"""The page's explain function inside interpreto."""

import numpy as np
import pytest
import torch
from code_blocks import block_of
from tiny import classifier, tokenizer

import pyglobenc

interpreto = pytest.importorskip(
    "interpreto", reason="interpreto isn't installed: docs/integrations.md says how"
)

TEXTS = ["A deep film.", "the good film"]


@pytest.fixture(scope="module")
def page():
    given = dict(model=classifier().float(), tokenizer=tokenizer(), pyglobenc=pyglobenc)
    exec(compile(block_of("integrations.md", "from interpreto"), "interpreto", "exec"), given)
    return given


def test_scores_and_tokens_are_those_of_explain_and_of_interpreto(page):
    model, words = page["model"], page["tokenizer"]
    for text in TEXTS:
        found, exact = page["explain"](text), pyglobenc.explain(model, words, text, "gradient-x-input")
        assert np.array_equal(found.attributions[0].numpy(), exact.scores)
        kind = interpreto.Granularity.ALL_TOKENS
        (other,) = interpreto.Saliency(model, words, granularity=kind).explain(text)
        assert found.elements == other.elements and torch.equal(found.targets, other.targets)
        assert found.granularity is other.granularity and found.model_task is other.model_task
        assert torch.equal(
            found.model_inputs_to_explain["input_ids"], other.model_inputs_to_explain["input_ids"]
        )


def test_metrics_and_pictures_take_it(page, tmp_path):
    from interpreto.attributions.metrics import Deletion, Insertion

    outputs = [page["explain"](text) for text in TEXTS]
    for metric in (Insertion, Deletion):
        value, curves = metric(page["model"], page["tokenizer"], n_perturbations=5)(outputs)
        assert 0 < value < 1 and len(curves) == len(TEXTS)
    interpreto.plot_attributions(outputs[0], save_path=str(tmp_path / "a.html"))
    assert "film" in (tmp_path / "a.html").read_text()

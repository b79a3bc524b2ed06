"""The page "Add a method" is true: its code is a method that `explain` runs."""

import re
from pathlib import Path

import pytest
import torch
from models import build, random_batch
from tiny import classifier, tokenizer

from pyglobenc import explain
from pyglobenc.methods import registry

PAGE = Path(__file__).parents[2] / "docs" / "add_a_method.md"
FILE, ENTRY = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def method(monkeypatch):
    """Return the page's class, whose entry is in the registry."""
    names = {"__name__": "cat"}
    exec(compile(FILE, "cat.py", "exec"), names)
    entry = eval(ENTRY, vars(registry) | names)
    monkeypatch.setitem(registry.METHODS, entry.name, entry)
    return names["Cat"]


@pytest.mark.parametrize("name", ["bert-classifier", "distilbert", "vit", "modernbert"])
def test_it_computes_what_it_says(method, name):
    model = build(name)
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    out = model(**batch, output_hidden_states=True)
    # the inputs of the layers, without the last one's output
    states = out.hidden_states[:3]
    grads = torch.autograd.grad(out.logits[:, 1].sum(), states)
    exact = sum((x * grad).sum(-1) for x, grad in zip(states, grads, strict=True)).detach()
    assert (method(model)(**batch, target=1).scores - exact).abs().max() <= 1e-9 * exact.abs().max()


def test_explain_offers_it(method):
    found = explain(
        classifier(), tokenizer(), ["a film", "the good film."], method="cat", target=1, progress=False
    )
    for a in found:
        one = method(classifier())(input_ids=torch.tensor([a.token_ids]), target=1)
        assert a.scores == pytest.approx(one.scores[0].numpy(), rel=1e-9) and a.target_name == "GOOD"


def test_it_refuses_by_name_and_leaves_nothing(method):
    model = classifier()
    batch = random_batch(model, batch=1, n=5)
    with pytest.raises(TypeError, match="Cat: takes no targe; did you mean target"):
        method(model)(**batch, targe=1)
    with pytest.raises(ValueError, match="Cat: target must lie in"):
        method(model)(**batch, target=2)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

"""Wrappers that change nothing: what is attributed is the model inside, as it would be alone."""

import peft
import pytest
import torch
from models import build, random_batch
from tiny import classifier, tokenizer
from torch import nn
from transformers import pipeline

from pyglobenc import GlobEnc, explain
from pyglobenc.hf.unwrap import called_module


def lora(mixed):
    """A classifier with a LoRA adapter whose weights aren't zero, as PEFT wraps it."""
    config = peft.LoraConfig(r=2, target_modules=["query", "attention.output.dense"], init_lora_weights=False)
    return peft.get_peft_model(build("bert-classifier"), config, mixed=mixed).eval()


@pytest.mark.parametrize("wrap", ["data_parallel", "twice", "pipeline", "peft", "peft_mixed"])
def test_a_wrapped_model_is_attributed_as_the_model_inside(wrap):
    given = {
        "data_parallel": lambda: nn.DataParallel(classifier()),
        "twice": lambda: nn.DataParallel(lora(False)),
        "pipeline": lambda: pipeline(
            "text-classification", model=classifier(), tokenizer=tokenizer(), device="cpu"
        ),
        "peft": lambda: lora(False),
        "peft_mixed": lambda: lora(True),
    }[wrap]()
    inner = called_module(given)
    assert type(inner).__name__ == "BertForSequenceClassification"
    batch = random_batch(inner, 2, 9, [0, 3])
    assert torch.equal(GlobEnc(given)(**batch).scores, GlobEnc(inner)(**batch).scores)
    # adapters stay in the model inside
    if "peft" in wrap or wrap == "twice":
        plain = build("bert-classifier")
        assert not torch.equal(inner(**batch).logits, plain(**batch).logits)
        torch.testing.assert_close(
            inner(**batch).logits, given(**batch).logits if wrap != "twice" else given.module(**batch).logits
        )
    alone, wrapped = (
        explain(model, tokenizer(), "the good film", progress=False) for model in (inner, given)
    )
    assert (alone.scores == wrapped.scores).all() and alone.label == wrapped.label


def test_what_holds_no_model_or_several_is_refused():
    for module, message in (
        (nn.DataParallel(nn.Linear(2, 2)), "must be a transformers PreTrainedModel"),
        (nn.Linear(2, 2), "must be"),
    ):
        with pytest.raises(TypeError, match=message):
            GlobEnc(module)
    with pytest.raises(TypeError, match="holds 2 transformers models"):
        GlobEnc(nn.ModuleList([build("bert"), build("distilbert")]))

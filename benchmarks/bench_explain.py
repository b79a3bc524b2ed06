"""A user's first calls on one short text, MiniLM and BERT-base's shape, against the plain forward pass in
processor time.

    pytest benchmarks/bench_explain.py --threads 1 --csv explain

`explain(model, tokenizer, text)` and `GlobEnc(model)(**batch)` hold everything that is made anew at each
call: checks of the model, tokens and the attribution's object. `ratio` is the call's processor time over that
of the plain forward pass on the same tokens, in turn.
"""

import time

import pytest
import torch
from measure import paired_ratio
from transformers import BertConfig, BertModel

from pyglobenc import GlobEnc, explain
from pyglobenc.models.pretrained import load_pretrained

DEVICE = torch.device("cpu")
ROUNDS = 30
WORD = "deep "
LENGTHS = (14, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained("minilm")


def text_of(tokenizer, n):
    """A text of n tokens, special tokens included."""
    text = WORD * (n - 2)
    assert len(tokenizer(text)["input_ids"]) == n
    return text


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("call", ["explain", "globenc", "globenc-kept"])
def bench_short(benchmark, loaded, call, n):
    model, tokenizer = loaded
    text = text_of(tokenizer, n)
    batch = tokenizer(text, return_tensors="pt")
    kept = GlobEnc(model)
    run = {
        "explain": lambda: explain(model, tokenizer, text),
        "globenc": lambda: GlobEnc(model)(**batch),
        "globenc-kept": lambda: kept(**batch),
    }[call]
    exact = GlobEnc(model, "reference")(**batch, targets=[0]).scores[0, 0]
    found = torch.as_tensor(run().scores).reshape(exact.shape)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def forward():
        return model(**batch)

    for _ in range(5):
        run(), forward()
    benchmark.extra_info.update(paired_ratio(run, forward, ROUNDS, clock=time.process_time))
    benchmark.pedantic(run, rounds=ROUNDS, iterations=1)


@pytest.mark.parametrize("n", LENGTHS[1:])
def bench_bert_base(benchmark, n):
    torch.manual_seed(0)
    model = BertModel(BertConfig(attn_implementation="sdpa")).eval()
    batch = {"input_ids": torch.randint(1000, 30000, (1, n))}

    def run():
        return GlobEnc(model)(**batch)

    exact = GlobEnc(model, "reference")(**batch).scores
    torch.testing.assert_close(run().scores, exact, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def forward():
        return model(**batch)

    for _ in range(3):
        run(), forward()
    benchmark.extra_info.update(paired_ratio(run, forward, ROUNDS, clock=time.process_time))
    benchmark.pedantic(run, rounds=3, iterations=1)

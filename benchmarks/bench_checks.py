"""What the checks of every call cost: a call of GlobEnc, or of transformer attribution, with and without
them.

    pytest benchmarks/bench_checks.py --threads 1 --csv checks

`share` is the processor time of a call with the checks over that without, less 1, measured in turn. Without
them nothing is projected and nothing compared; capture's hooks are there all the same.
"""

from contextlib import contextmanager
from statistics import median, quantiles
from time import process_time
from unittest.mock import patch

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import GlobEnc, TransformerAttribution
from pyglobenc.hf.trace.layers import LayerTrace

MINILM = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
CALLS = {
    "globenc": (GlobEnc, {}),
    "transformer-attribution": (TransformerAttribution, {"reliability": "off"}),
}
# model, tokens, rounds
SHAPES = [("minilm", 14, 60), ("bert-base", 16, 20), ("bert-base", 128, 10), ("bert-base", 512, 4)]


@contextmanager
def unchecked():
    with (
        patch.object(LayerTrace, "keep", lambda *args, **options: None),
        patch("pyglobenc.hf.trace.capture.check_layers", lambda *args: None),
        patch("pyglobenc.hf.trace.capture.check_still", lambda *args: None),
    ):
        yield


def seconds(call):
    start = process_time()
    call()
    return process_time() - start


@pytest.mark.parametrize("shape, n, rounds", SHAPES)
@pytest.mark.parametrize("method", CALLS)
def bench_call(benchmark, method, shape, n, rounds):
    config = BertConfig(**(MINILM if shape == "minilm" else {}), attn_implementation="sdpa")
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(1000, 30000, (1, n))
    kind, options = CALLS[method]
    attribute = kind(model)

    def call():
        return attribute(input_ids=ids, attention_mask=torch.ones_like(ids), **options).scores

    with unchecked():
        without = call()
    assert torch.equal(call(), without)
    shares = []
    for _ in range(rounds):
        checked = seconds(call)
        with unchecked():
            shares.append(checked / seconds(call) - 1)
    low, _, high = quantiles(shares, n=4)
    benchmark.extra_info.update(share=f"{median(shares):.4f}", share_q1=f"{low:.4f}", share_q3=f"{high:.4f}")
    benchmark.pedantic(call, rounds=3, iterations=1)

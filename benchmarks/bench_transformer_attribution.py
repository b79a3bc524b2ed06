"""Transformer attribution on BERT-base's shape against the same model's plain forward pass (stock
transformers, SDPA, float32, batch 1), on a GPU if there is one.

    pytest benchmarks/bench_transformer_attribution.py --csv transformer_attribution

`ratio` is the call's time over the plain forward's, measured in turn in the same process; `cpu_ratio` that of
the processor time, which a machine shared with others changes less. "materialised" is the published algorithm
on n*n arrays and clamped weights, without the inhibitor term that the published code computes and multiplies
by 0.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from chefer import direct, relative
from measure import DEVICE, finished, paired_ratio, peak_memory_mb
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import TransformerAttribution

LENGTHS = (128, 256, 512)
ROUNDS = 3


def base():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(attn_implementation="sdpa")).to(DEVICE).eval()


@pytest.fixture(scope="module")
def model():
    return base()


def batch_of(n):
    ids = torch.randint(1000, 30000, (1, n)).to(DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(benchmark, call, forward, rounds):
    call, forward = finished(call), finished(forward)
    call()
    benchmark.extra_info.update(paired_ratio(call, forward, rounds))
    if DEVICE.type == "cpu":
        benchmark.extra_info["cpu_ratio"] = f"{processor_ratio(call, forward, rounds):.3f}"
    benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=0)


def processor_ratio(call, baseline, rounds):
    """Median ratio of the processor time, all threads, of two calls in turn."""
    ratios = []
    for _ in range(rounds):
        start = time.process_time()
        baseline()
        middle = time.process_time()
        call()
        ratios.append((time.process_time() - middle) / (middle - start))
    return median(ratios)


def calls(model, n):
    batch = batch_of(n)

    @torch.no_grad()
    def forward():
        return model(**batch)

    return batch, forward


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("n", LENGTHS)
def bench_row_mode(benchmark, model, n, backend):
    assert_right(model, backend)
    batch, forward = calls(model, n)
    ta = TransformerAttribution(model, backend=backend)
    run(benchmark, lambda: ta(**batch), forward, ROUNDS)


def head(model):
    return [(model.classifier, model.classifier.weight[1:2].detach()), model.bert.pooler.dense]


@pytest.mark.parametrize("n", [128, 512])
def bench_materialised(benchmark, model, n):
    batch, forward = calls(model, n)
    run(benchmark, lambda: direct(model, batch, lambda out: out.logits[0, 1], head(model)), forward, 2)


@pytest.mark.parametrize("what", ["forward", "row_mode", "materialised"])
@pytest.mark.parametrize("n", [128, 512])
def bench_peak_memory(benchmark, monkeypatch, n, what):
    if DEVICE.type != "cpu":
        pytest.skip("is of the CPU's memory; bench_methods.py has a GPU's")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    benchmark.extra_info["peak_mib"] = f"{peak_memory_mb(Path(__file__), what, str(n)):.0f}"
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)


def assert_right(model, backend):
    """Equal to the materialised rules in float64, up to float32 rounding amplified, on a length that takes
    little time.
    """
    batch = batch_of(12)
    exact, _ = direct(model, batch, lambda out: out.logits[0, 1], head(model))
    result = TransformerAttribution(model, backend=backend)(**batch, target=1, reliability="off")
    assert relative(result.scores[0], exact.double()) <= 1e-2


def main(what, n):
    model = base()
    batch, forward = calls(model, int(n))
    if what == "forward":
        forward()
    elif what == "row_mode":
        TransformerAttribution(model, backend="reference")(**batch)
    else:
        direct(model, batch, lambda out: out.logits[0, 1], head(model))


if __name__ == "__main__":
    main(*sys.argv[1:])

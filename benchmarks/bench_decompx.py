"""DecompX on BERT-base's shape against its plain forward pass (random weights, float32, batch 1).

    pytest benchmarks/bench_decompx.py --csv decompx

Over the split of the biases and n. `ratio` is the call's time over the forward's, in turn in one process. On
a CPU it is CPU time, which other work on the machine changes less. `peak_mb` is the allocator's peak above
the weights. The `absdot` split takes minutes at n = 512, so it runs twice there and its peak isn't measured.
"""

import time

import pytest
import torch
from measure import DEVICE, finished, paired_ratio
from op_benchmark import peak_mb
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import DecompX

CLOCK = time.process_time if DEVICE.type == "cpu" else time.perf_counter


@pytest.mark.parametrize("bias", ["none", "equal", "absdot"])
@pytest.mark.parametrize("n", [128, 512])
def bench_decompx(benchmark, bias, n):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).to(DEVICE).eval()
    inputs = {"input_ids": torch.randint(1000, 30000, (1, n)).to(DEVICE)}
    explain, long = DecompX(model), bias == "absdot" and n == 512
    call = finished(lambda: explain(**inputs, bias=bias))
    forward = finished(torch.no_grad()(lambda: model(**inputs)))
    assert float(explain(**inputs, bias="none").error) < 1e-3
    rounds = 1 if bias == "absdot" else 5
    ratio = paired_ratio(call, forward, rounds, CLOCK)
    benchmark.extra_info.update(ratio, peak_mb="" if long else f"{peak_mb(call, DEVICE):.1f}")
    benchmark.pedantic(call, rounds=rounds, iterations=1)

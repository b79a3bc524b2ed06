"""DecompX on BERT-base's shape against its plain forward pass (random weights, float32, batch 1).

    pytest benchmarks/bench_decompx.py --csv decompx

Over the split of the biases and n. `ratio` is the call's time over the forward's, in turn in one process. On
a CPU it is CPU time, which other work on the machine changes less. `peak_mb` is the allocator's peak above
the weights. `resident_mb` is the highest resident memory of the timed calls, above that before them (Linux).
The `absdot` split takes minutes at n = 512, so it runs once there and its `peak_mb` isn't measured. It would
take more than an hour at n = 2,048.
"""

import time

import pytest
import torch
from measure import DEVICE, finished, forget_resident_peak, resident_mb, time_in_turn
from op_benchmark import LENGTHS, peak_mb
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import DecompX

CLOCK = time.process_time if DEVICE.type == "cpu" else time.perf_counter


@pytest.mark.parametrize("bias", ["none", "equal", "absdot"])
@pytest.mark.parametrize("n", LENGTHS)
def bench_decompx(benchmark, bias, n):
    slow, shortest = bias == "absdot", n == min(LENGTHS)
    if slow and n == max(LENGTHS):
        pytest.skip("takes about 0.7 forward passes for each token")
    torch.manual_seed(0)
    config = BertConfig(max_position_embeddings=max(LENGTHS))
    model = BertForSequenceClassification(config).to(DEVICE).eval()
    inputs = {"input_ids": torch.randint(1000, 30000, (1, n)).to(DEVICE)}
    explain = DecompX(model)
    call = finished(lambda: explain(**inputs, bias=bias))
    forward = finished(torch.no_grad()(lambda: model(**inputs)))
    assert float(explain(**inputs, bias="none").error) < 1e-3
    if not slow or shortest:
        benchmark.extra_info["peak_mb"] = f"{peak_mb(call, DEVICE):.1f}"
    forget_resident_peak()
    before = resident_mb()
    time_in_turn(benchmark, call, forward, 1 if slow else 5 if n < max(LENGTHS) else 3, CLOCK)
    benchmark.extra_info["resident_mb"] = f"{resident_mb() - before:.1f}"

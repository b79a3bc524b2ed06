"""DecompX on BERT-base's shape against its plain forward pass (random weights, float32, batch 1).

    pytest benchmarks/bench_decompx.py --csv decompx

Over the split of the biases and n. `ratio` is the call's time over the forward's, in turn in one process;
`peak_mb` is the allocator's peak above the weights. The `absdot` split takes minutes at n = 512.
"""

import pytest
import torch
from measure import DEVICE, finished, paired_ratio
from op_benchmark import peak_mb
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import DecompX

ROUNDS = {"absdot": 1}


@pytest.mark.parametrize("bias", ["none", "equal", "absdot"])
@pytest.mark.parametrize("n", [128, 512])
def bench_decompx(benchmark, bias, n):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).to(DEVICE).eval()
    inputs = {"input_ids": torch.randint(1000, 30000, (1, n)).to(DEVICE)}
    explain = DecompX(model)
    call, forward = (
        finished(lambda: explain(**inputs, bias=bias)),
        finished(torch.no_grad()(lambda: model(**inputs))),
    )
    result, rounds = call(), ROUNDS.get(bias, 5)
    assert float(result.error) < 1e-3
    benchmark.extra_info.update(paired_ratio(call, forward, rounds), peak_mb=f"{peak_mb(call, DEVICE):.1f}")
    benchmark.pedantic(call, rounds=rounds, iterations=1)

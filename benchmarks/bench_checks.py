"""What the checks of every call cost: the time inside them in a call of GlobEnc, or of transformer
attribution.

    pytest benchmarks/bench_checks.py --threads 1 --csv checks

`share` is the processor time inside the checks over that of the rest of the same call. Both are taken in one
call, because the times of two calls differ by more than the checks take on a machine with other work.
"""

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median, quantiles
from time import thread_time
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import GlobEnc, TransformerAttribution
from pyglobenc.hf.trace import capture
from pyglobenc.hf.trace.layers import LayerTrace

MINILM = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
CALLS = {
    "globenc": (GlobEnc, {}),
    "transformer-attribution": (TransformerAttribution, {"reliability": "off"}),
}
# model, tokens, rounds
SHAPES = [("minilm", 14, 40), ("bert-base", 16, 12), ("bert-base", 128, 5), ("bert-base", 512, 3)]
# Everything that the checks compute: they project tensors while the model runs, and compare them afterwards.
CHECKS = [(LayerTrace, "keep")] + [(capture, name) for name in ("linear_call", "check_layers", "check_still")]


class Clock:
    """Processor time inside functions that were wrapped; calls inside one another count once."""

    def __init__(self):
        self.spent, self.inside = 0.0, False

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if self.inside:
                return function(*args, **options)
            self.inside, start = True, thread_time()
            try:
                return function(*args, **options)
            finally:
                self.spent += thread_time() - start
                self.inside = False

        return timed


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

    alone, clock, shares = call(), Clock(), []
    with ExitStack() as stack:
        for owner, name in CHECKS:
            stack.enter_context(patch.object(owner, name, clock.wrap(getattr(owner, name))))
        for _ in range(rounds):
            clock.spent, start = 0.0, thread_time()
            assert torch.equal(call(), alone)
            shares.append(clock.spent / (thread_time() - start - clock.spent))
    assert min(shares) > 0
    low, _, high = quantiles(shares, n=4)
    benchmark.extra_info.update(share=f"{median(shares):.4f}", share_q1=f"{low:.4f}", share_q3=f"{high:.4f}")
    benchmark.pedantic(call, rounds=2, iterations=1)

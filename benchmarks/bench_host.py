"""What Python and launches cost: a 12-layer BERT so narrow that its kernels take next to no time, 16 tokens.

    pytest benchmarks/bench_host.py --threads 1 --csv host

`ratio` is the call's time over the plain forward pass's, measured in turn. On a GPU it bounds every input
whose kernels are done before the host has launched the next ones.
"""

import pytest
import torch
from measure import DEVICE, finished, paired_ratio
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import GlobEnc, TransformerAttribution

ON_GPU = DEVICE.type == "cuda"
ROUNDS, TOKENS = 100, 16
BACKENDS = ("triton", "cuda") if ON_GPU else ("cpu",)
METHODS = {"globenc": GlobEnc, "transformer-attribution": TransformerAttribution}
CALLS = [
    ("globenc", {}),
    *(("transformer-attribution", {"reliability": how}) for how in ("off", "estimated", "measured")),
]


@pytest.fixture
def model():
    config = BertConfig(
        hidden_size=128, num_attention_heads=2, intermediate_size=256, attn_implementation="sdpa"
    )
    return (
        BertForSequenceClassification(config).to(DEVICE, torch.bfloat16 if ON_GPU else torch.float32).eval()
    )


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "method, options",
    CALLS,
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "row",
)
def bench_call(benchmark, model, method, options, backend):
    ids = torch.randint(1000, 30000, (1, TOKENS), device=DEVICE)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    attribute = METHODS[method](model, backend)
    exact = METHODS[method](model, "reference")(**batch, **options).scores
    torch.testing.assert_close(
        attribute(**batch, **options).scores, exact, rtol=1e-2, atol=1e-2 * float(exact.abs().max())
    )

    @torch.no_grad()
    def plain():
        return model(**batch)

    call, forward = finished(lambda: attribute(**batch, **options)), finished(plain)
    for _ in range(10):
        call(), forward()
    benchmark.extra_info.update(paired_ratio(call, forward, ROUNDS))
    benchmark.pedantic(call, rounds=ROUNDS, iterations=1)

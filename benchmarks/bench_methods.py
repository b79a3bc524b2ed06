"""Methods on BERT-base's shape against the same model's plain forward pass (random weights).

All but four are measured: the search of the flow takes minutes, integrated gradients and occlusion take as
many passes as they have steps or tokens, and DecompX has a benchmark of its own.

    pytest benchmarks/bench_methods.py --csv methods

Over backend, n, the model's dtype and batch; "forward" is the model alone, and "captum" the rival, if it is
installed. `ratio` is the call's time over
the forward's, in turn in one process; `peak_mb` is the allocator's peak above the weights and what was kept
with them. Cases that don't fit into memory are skipped.
"""

from functools import lru_cache

import pytest
import torch
from measure import DEVICE, finished, time_in_turn
from op_benchmark import BATCHES, DTYPES, LENGTHS, SLOW, peak_mb
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc.inputs.batching import SHARE, available_bytes
from pyglobenc.methods.gradients.attribution import GRADIENTS
from pyglobenc.methods.gradients.backward_rules import RULES
from pyglobenc.methods.memory import estimate_memory
from pyglobenc.methods.registry import METHODS

FORWARD, CAPTUM, ROUNDS = "forward", "captum", 3
# Gradients have no kernels, and so no backends.
CALLS = [(FORWARD, ""), ("Saliency", CAPTUM), ("InputXGradient", CAPTUM)] + [
    (name, backend)
    for name, method in METHODS.items()
    if name not in ("attention-flow", "decompx") and not method.replaces_tokens
    for backend in (("auto",) if name in GRADIENTS or name in RULES else ("reference", "auto"))
]


@lru_cache(maxsize=1)
def model_of(dtype):
    torch.manual_seed(0)
    config = BertConfig(max_position_embeddings=max(LENGTHS), attn_implementation="sdpa")
    return BertForSequenceClassification(config).to(DEVICE, getattr(torch, dtype)).eval()


def build(model, method, backend, batch, n, dtype=None):
    """A call without arguments that returns what was computed."""
    inputs = {
        "input_ids": torch.randint(1000, 30000, (batch, n), generator=torch.Generator().manual_seed(0)).to(
            DEVICE
        )
    }
    if method == FORWARD:
        return finished(torch.no_grad()(lambda: model(**inputs)))
    if backend == CAPTUM:
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
        rival = getattr(pytest.importorskip("captum.attr"), method)(lambda x: model(inputs_embeds=x).logits)
        return finished(lambda: rival.attribute(embeddings, target=0))
    run, targets = (
        METHODS[method].build(model, backend, dtype),
        torch.zeros(batch, dtype=torch.long, device=DEVICE),
    )
    return finished(lambda: run(inputs, targets))


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("method, backend", CALLS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_method(benchmark, method, backend, batch, n, dtype):
    if (DEVICE.type, getattr(torch, dtype)) == SLOW:
        pytest.skip("torch's float16 products run at 1 to 2 GFLOP/s on a CPU")
    model = model_of(dtype)
    if method in METHODS:
        needed, free = estimate_memory(model, batch=batch, n=n, method=method).peak, available_bytes(DEVICE)
        if free is not None and needed > SHARE * free:
            pytest.skip(f"takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
        assert_right(model, method, backend)
    call, forward = build(model, method, backend, batch, n), build(model, FORWARD, "", batch, n)
    benchmark.extra_info["peak_mb"] = f"{peak_mb(call, DEVICE):.1f}"
    time_in_turn(benchmark, call, forward, ROUNDS)


def assert_right(model, method, backend):
    """As the reference, in float64 for a float32 model, on a length that takes little time: to 1e-2, or,
    where rounding takes more than that from the reference itself (`lrp`), twice its own error.
    """
    wide = torch.float64 if model.dtype == torch.float32 else None
    calls = ((backend, 2, 12), ("reference", 2, 12), ("reference", 2, 12, wide))
    ours, plain, exact = (build(model, method, *which)().scores.double() for which in calls)
    error, own = ((scores - exact).abs().max() for scores in (ours, plain))
    assert error <= max(1e-2 * exact.abs().max(), 2 * own)

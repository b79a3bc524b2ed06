"""GlobEnc, transformer attribution and gradient rollout beside the plain forward pass, up to long inputs.

    pytest benchmarks/bench_lengths.py --csv lengths

The models have random weights: BERT-base's shape with more positions, and two layers of Llama 3 8B's shape.
The plain forward pass is that of stock transformers with SDPA, batch 1, and it is timed in turn with the
call. `ratio` is the call's time over the forward pass's. Running out of memory is a result, with no time.
"""

from functools import lru_cache
from itertools import product
from statistics import median

import pytest
import torch
from measure import DEVICE, finished, paired_times, ratio_of, spread
from op_benchmark import SLOW, peak_mb
from small_llama import small_llama
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from pyglobenc.inputs.batching import out_of_memory
from pyglobenc.methods.registry import METHODS, MODELS

LENGTHS = (512, 2048, 8192, 32_768, 131_072) if DEVICE.type == "cuda" else (128, 512)
# Every prefix of the list is worth having: what a run that is cut off has measured.
CASES = [
    (dtype, n, method)
    for dtype in ("bfloat16", "float16", "float32")
    for n, method in product(LENGTHS, ("globenc", "transformer-attribution", "gradient-rollout"))
]
BERT = dict(vocab_size=4096, max_position_embeddings=max(LENGTHS), attn_implementation="sdpa")
LLAMA = dict(vocab_size=4096, max_position_embeddings=max(LENGTHS), hidden_size=4096)
LLAMA |= dict(intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8)
# Rounds are as many as fit in these seconds, and at most so many.
SECONDS, ROUNDS = 3.0, 9


@lru_cache(maxsize=1)
def model_of(shape: str, dtype: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with DEVICE:
        bert = BertConfig(**BERT)
        model = small_llama(**LLAMA) if shape == "llama" else BertForSequenceClassification(bert)
    return model.to(getattr(torch, dtype)).eval()


@lru_cache
def check(shape: str, dtype: str, method: str) -> None:
    """Compare a method with the reference on few tokens, once for each model.

    A rollout's lower layers are left out, because relevance divides by scores near 0 there.
    """
    model, entry = model_of(shape, dtype), METHODS[method]
    start = model.config.num_hidden_layers - 1 if entry.has_start_layer else 0
    runs = [entry.run("bench", model, backend, None, start) for backend in ("auto", "reference")]
    ours, plain = (run({"input_ids": tokens(model, 40)}, None).scores for run in runs)
    assert (ours - plain).abs().max() <= 1e-2 * plain.abs().max()


def tokens(model: PreTrainedModel, n: int) -> torch.Tensor:
    """Return n random ids, (1, n)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, model.config.vocab_size, (1, n), generator=generator).to(DEVICE)


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("dtype, n, method", CASES)
@pytest.mark.parametrize("shape", ["bert", "llama"])
def bench_lengths(benchmark, shape, dtype, n, method):
    if (DEVICE.type, getattr(torch, dtype)) == SLOW:
        pytest.skip("torch's float16 products run at 1 to 2 GFLOP/s on a CPU")
    model = model_of(shape, dtype)
    if model.config.model_type not in MODELS[METHODS[method].models]:
        pytest.skip(f"{method} is not for this model")
    check(shape, dtype, method)
    try:
        found = measured(model, method, n)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        found = dict(outcome="out of memory", median_s="", q1_s="", q3_s="", rounds=0)
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    benchmark.extra_info.update(found)


def measured(model: PreTrainedModel, method: str, n: int) -> dict:
    """Time a method on n tokens, in turn with the forward pass."""
    ids = tokens(model, n)
    run = METHODS[method].run("bench", model, "auto", None)
    forward = finished(torch.no_grad()(lambda: model(input_ids=ids)))
    call = finished(lambda: run({"input_ids": ids}, None))
    forward()
    peak = peak_mb(call, DEVICE)
    # The first calls have compiled what they need.
    taken = paired_times(call, forward, 1)
    taken += paired_times(call, forward, min(ROUNDS, int(SECONDS / sum(taken[0]))))
    seconds = dict(zip(("median_s", "q1_s", "q3_s"), spread([ours for _, ours in taken]), strict=True))
    seconds["forward_s"] = median(plain for plain, _ in taken)
    out = {name: f"{value:.6g}" for name, value in seconds.items()} | ratio_of(taken)
    return out | dict(rounds=len(taken), peak_mb=f"{peak:.1f}", outcome="measured")

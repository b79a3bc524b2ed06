"""`explain_generation`: tokens of an answer after a long prompt, on a small Llama shape.

    pytest benchmarks/bench_generation.py --csv generation

An answer of `count` tokens after a prompt of 1,000 is explained, in float32 at batch 1. `ratio` is the
process time over that of the model's plain forward pass of the same tokens, taken after it. `peak_mb` is the
allocator's peak above the weights.
"""

import time
from functools import lru_cache

import pytest
import torch
from measure import DEVICE, finished
from op_benchmark import peak_mb
from small_llama import number_tokenizer, small_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pyglobenc import explain_generation

PROMPT, VOCABULARY = 1000, 8192
FORWARDS = 5
METHODS = ("globenc", "gradient-x-input", "gradient-rollout")


@lru_cache
def model() -> LlamaForCausalLM:
    """Return 2 layers of a Llama of width 128, with random weights."""
    return small_llama(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the ids themselves."""
    return number_tokenizer(VOCABULARY)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 10, 100])
def bench_generation(benchmark, method, count):
    ids = torch.randint(1, VOCABULARY, (PROMPT + count,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = " ".join(map(str, ids[:PROMPT]))

    def call():
        return explain_generation(model(), tokenizer(), prompt, method, answer=ids[PROMPT:])

    whole = torch.tensor([ids[:-1]], device=DEVICE)
    forward = torch.no_grad()(lambda: model()(input_ids=whole, logits_to_keep=count))
    # The profiler that finds the peak also warms the call up.
    peak = peak_mb(call, DEVICE)
    start = time.process_time()
    benchmark.pedantic(finished(call), rounds=1, iterations=1)
    middle = time.process_time()
    for _ in range(FORWARDS):
        finished(forward)()
    ratio = FORWARDS * (middle - start) / (time.process_time() - middle)
    benchmark.extra_info.update(ratio=f"{ratio:.3f}", prompt=PROMPT, peak_mb=f"{peak:.1f}")

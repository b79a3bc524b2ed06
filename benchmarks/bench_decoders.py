"""Methods on a Llama-shaped language model, beside captum, inseq and flashtrace on the same model.

    pytest benchmarks/bench_decoders.py --csv decoders

Each call explains the token that follows n tokens. It is timed in turn with the model's plain forward pass
(stock transformers, SDPA, float32, batch 1), and `ratio` is its time over the forward pass's. The rivals run
if they are installed. `peak_mb` is the allocator's peak above the weights.
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from measure import DEVICE, finished, paired_ratio
from op_benchmark import LENGTHS, peak_mb
from small_llama import number_tokenizer, small_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pyglobenc.methods.registry import METHODS

ROUNDS, TOKEN, VOCABULARY, STEPS = 3, 7, 4096, 32
# The search of the flow takes minutes, and occlusion takes as many forward passes as there are tokens.
LEFT_OUT = ("attention-flow", "occlusion")
# The most tokens of methods that take a forward and a backward pass for each of their steps.
LONGEST, STEPWISE = 512, ("integrated-gradients", "captum IntegratedGradients")


@lru_cache
def model() -> LlamaForCausalLM:
    """Return 2 layers of Llama 3.2 1B's proportions at a quarter of its width, with random weights."""
    return small_llama(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=max(LENGTHS),
    )


def tokens(n: int) -> torch.Tensor:
    """Return n random ids, (1, n)."""
    return torch.randint(100, VOCABULARY, (1, n), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the ids themselves, since the rivals take texts alone."""
    return number_tokenizer(VOCABULARY, bos_token="1", eos_token="2")


def own(name: str) -> Callable[[int], Callable[[], object]]:
    """Return the builder of a method of the registry."""

    def build(n: int) -> Callable[[], object]:
        method = METHODS[name]
        run = method.run("bench", model(), "auto", None)
        target = torch.tensor([TOKEN], device=DEVICE) if method.target == "class" else None
        extra = dict(replacement=0) if method.replaces_tokens else {}
        return lambda: run(dict(input_ids=tokens(n), **extra), target)

    return build


def captum(name: str) -> Callable[[int], Callable[[], object]]:
    """Return the builder of a method of captum on the embeddings, as its tutorials on language models do."""

    def build(n: int) -> Callable[[], object]:
        attr = pytest.importorskip("captum.attr")

        def logit(embeddings: torch.Tensor) -> torch.Tensor:
            return model()(inputs_embeds=embeddings).logits[:, -1]

        embeddings = model().get_input_embeddings()(tokens(n)).detach()
        method = getattr(attr, name)(logit)
        more = dict(n_steps=STEPS, internal_batch_size=1) if name == "IntegratedGradients" else {}
        return lambda: method.attribute(embeddings, target=TOKEN, **more)

    return build


def inseq(name: str) -> Callable[[int], Callable[[], object]]:
    """Return the builder of a method of inseq, for one generated token."""

    def build(n: int) -> Callable[[], object]:
        library = pytest.importorskip("inseq")
        loaded = library.load_model(model(), name, tokenizer=tokenizer())
        prompt = " ".join(str(i) for i in tokens(n)[0].tolist())
        return lambda: loaded.attribute(
            prompt, f"{prompt} {TOKEN}", show_progress=False, attribute_target=False
        )

    return build


def flashtrace(name: str) -> Callable[[int], Callable[[], object]]:
    """Return the builder of a method of flashtrace, for one generated token."""

    def build(n: int) -> Callable[[], object]:
        library = pytest.importorskip("flashtrace")
        # Otherwise it needs eager attention, and stores its probabilities.
        tracer = library.FlashTrace(model(), tokenizer(), recompute_attention=True)
        prompt = " ".join(str(i) for i in tokens(n)[0].tolist())
        return lambda: tracer.trace(prompt=prompt, target=str(TOKEN), method=name)

    return build


CALLS = {
    name: own(name)
    for name, method in METHODS.items()
    if name not in LEFT_OUT and (method.target == "token" or method.next_token)
}
CALLS |= {f"captum {name}": captum(name) for name in ("Saliency", "InputXGradient", "IntegratedGradients")}
CALLS |= {f"inseq {name}": inseq(name) for name in ("saliency", "input_x_gradient")}
CALLS |= {"flashtrace ifr-span": flashtrace("ifr-span")}


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("n", LENGTHS)
def bench_decoder(benchmark, method, n):
    if method in STEPWISE and n > LONGEST:
        pytest.skip(f"takes {STEPS} forward and backward passes")
    call, ids = finished(CALLS[method](n)), tokens(n)
    forward = finished(torch.no_grad()(lambda: model()(input_ids=ids)))
    try:
        call()
    except ValueError as error:
        # Methods of post-norm encoders refuse this model.
        if method not in METHODS:
            raise
        pytest.skip(str(error))
    forward()
    benchmark.extra_info.update(paired_ratio(call, forward, ROUNDS), peak_mb=f"{peak_mb(call, DEVICE):.1f}")
    benchmark.pedantic(call, rounds=1, iterations=1)

"""Captures in several threads at once: each gets the result that it gets alone, and plain calls of the same
models theirs.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from threading import Barrier

import pytest
import torch
from models import build, random_batch
from torch._dynamo import eval_frame

from pyglobenc import GlobEnc, TransformerAttribution, capture
from pyglobenc.hf import find_layers
from pyglobenc.hf.trace.attention import RECORDERS
from pyglobenc.methods.arguments import forward_replaced, takes

CALLS = 12


def at_once(*tasks):
    """Run each task in a thread of its own, all started together; what they return."""
    barrier = Barrier(len(tasks))

    def run(task):
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def untouched(*models):
    for model in models:
        assert not any(
            m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) or m in RECORDERS
            for m in model.modules()
        )
        assert type(model.config).__module__.startswith(
            "transformers"
        ) and model.config._attn_implementation in ("sdpa", "eager")
        assert type(model.config) is type(copy.deepcopy(model.config))
    assert eval_frame._stance.stance == "default"


def repeated(call, calls=CALLS):
    return lambda: [call() for _ in range(calls)]


@pytest.mark.parametrize("name", ["bert-classifier", "modernbert", "gemma3", "deberta-v3", "vit"])
def test_plain_calls_of_a_captured_model(name):
    """They come between the hooks of a capture, and while they are put on and taken off."""
    model = build(name)
    batch, other = random_batch(model, 2, 9, pads=[0, 3]), random_batch(model, 3, 9, pads=[2, 0, 4])
    globenc = GlobEnc(model)
    plain = torch.no_grad()(lambda: model(**other)[0])
    scores, output = globenc(**batch).scores, plain()
    attributed, *called = at_once(
        repeated(lambda: globenc(**batch).scores), *[repeated(plain, 2 * CALLS)] * 2
    )
    assert all(torch.equal(one, scores) for one in attributed)
    assert all(torch.equal(one, output) for one in (*called[0], *called[1]))
    untouched(model)


def test_a_thread_that_comes_while_another_captures():
    """Whatever the implementation, it runs with its own masks, and packed and widened passes are for the
    thread that asked.
    """
    for name, attention in (("bert-classifier", "eager"), ("bert-classifier", "sdpa"), ("gpt2", "eager")):
        model = build(name, attention=attention)
        batch = random_batch(model, 2, 9, pads=[0, 3])
        with torch.no_grad():
            exact = model(**batch)[0]
            with capture(model) as trace:
                model(**batch)
                seen = [layer.q for layer in trace.layers]
                with ThreadPoolExecutor(1) as pool:
                    found = pool.submit(
                        torch.no_grad()(lambda m=model, b=batch: (m(**b)[0], m.config._attn_implementation))
                    ).result()
                    assert (
                        pool.submit(lambda m=model: pickle.loads(pickle.dumps(m.config))).result().to_dict()
                        == model.config.to_dict()
                    )
                assert torch.equal(found[0], exact) and found[1] == attention
                assert all(layer.q is q for layer, q in zip(trace.layers, seen, strict=True))
        untouched(model)


def test_relevance_and_packed_calls_beside_plain_ones():
    model = build("bert-classifier")
    batch, other = random_batch(model, 2, 9, pads=[0, 3]), random_batch(model, 3, 9, pads=[2, 0, 4])
    relevance, globenc = TransformerAttribution(model), GlobEnc(model)
    lists = [[5, 6, 7], [8, 9]]
    plain = torch.no_grad()(lambda: model(**other).logits)

    def call():
        return relevance(**batch).scores, globenc.packed(input_ids=lists)[0].scores

    exact, output = call(), plain()
    attributed, called = at_once(repeated(call), repeated(plain, 4 * CALLS))
    assert all(torch.equal(a, b) for one in attributed for a, b in zip(one, exact, strict=True))
    assert all(torch.equal(one, output) for one in called)
    untouched(model)


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_models_that_share_a_config(name):
    one = build(name)
    other = type(one)(one.config).double().eval()
    assert other.config is one.config
    batch = random_batch(one, 2, 9, pads=[0, 3])
    calls = [lambda m=m: GlobEnc(m)(**batch).scores for m in (one, other)]
    exact = [call() for call in calls]
    for scores, found in zip(exact, at_once(*map(repeated, calls)), strict=True):
        assert all(torch.equal(each, scores) for each in found)
    untouched(one, other)


def test_models_that_share_layers_are_refused_at_once():
    one, other = build("bert"), build("bert")
    other.encoder.layer[1] = one.encoder.layer[2]
    with capture(one):
        for thread in (lambda task: task(), lambda task: at_once(task)):
            with pytest.raises(RuntimeError, match="being captured already"):
                thread(lambda: capture(other).__enter__())
    batch = random_batch(one, 1, 7)
    assert GlobEnc(other)(**batch).scores.shape == (1, 1, 7)
    untouched(one, other)


def test_what_captures_share_is_given_back_by_the_last():
    one, other = build("bert"), build("gpt2")
    first, second = capture(one), capture(other)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    untouched_layers = [m.attention for m in find_layers(other)]
    assert all(m in RECORDERS for m in untouched_layers)
    second.__exit__(None, None, None)
    untouched(one, other)


def test_a_replaced_forward_keeps_its_signature():
    """A thread that checks its arguments while another one runs a packed call reads the model's own."""
    model = build("bert-classifier")
    before = signature(model.base_model.forward)
    with forward_replaced(model.base_model, lambda *args, **kwargs: None):
        assert signature(model.base_model.forward) == before and takes(model.base_model, "position_ids")
    assert "forward" not in vars(model.base_model)


def test_packed_calls_of_several_threads():
    """Two threads pack sequences of their own models while a third one calls both with padding."""
    models = [build("bert-classifier"), build("roberta")]
    packed = {"input_ids": [[5, 6, 7, 8], [9, 10]]}
    batches = [random_batch(model, 2, 9, pads=[0, 3]) for model in models]
    expected = [[one.scores for one in GlobEnc(model).packed(**packed)] for model in models]
    plain = [model(**batch)[0].detach() for model, batch in zip(models, batches, strict=True)]

    def called():
        with torch.no_grad():
            return [model(**batch)[0] for model, batch in zip(models, batches, strict=True)]

    calls = [lambda m=model: [one.scores for one in GlobEnc(m).packed(**packed)] for model in models]
    *found, outputs = at_once(*(repeated(call) for call in calls), repeated(called))
    for each, exact in [*zip(found, expected, strict=True), (outputs, plain)]:
        for result in each:
            assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(result, exact, strict=True))
    untouched(*models)

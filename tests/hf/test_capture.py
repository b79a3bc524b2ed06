import gc
from importlib import import_module

import pytest
import torch
import transformers
from models import ARCHITECTURES, CAUSAL, IMAGES, OWN_SCORES, PRE_NORM, build, random_batch
from published import Float64Throughout

from pyglobenc import capture
from pyglobenc.hf import find_layers
from pyglobenc.hf.trace.attention import RECORDERS


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def model():
    return build("bert-classifier")


def assert_untouched(model, attention="sdpa", hooks=0):
    assert hooks_of(model) == hooks
    assert not any("forward" in vars(m) for m in model.modules())
    assert model.config._attn_implementation == attention
    assert not any(module in RECORDERS for module in model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in OWN_SCORES])
def test_layers_hold_what_the_model_computed(name, attention):
    model = build(name, attention=attention)
    batch = random_batch(model, batch=2, n=9, pads=[0, 4])
    with torch.no_grad():
        model.set_attn_implementation("eager")
        exact = model(**batch, output_hidden_states=True, output_attentions=True)
        model.set_attn_implementation(attention)
        # transformers leaves hooks of its own after the pass above
        hooks = hooks_of(model)
        with capture(model) as trace:
            output = model(**batch)
    assert_untouched(model, attention, hooks)
    torch.testing.assert_close(output[0], exact[0], rtol=1e-10, atol=1e-12)
    real = batch["attention_mask"].bool()
    for index, layer in enumerate(trace.layers):
        torch.testing.assert_close(layer.x[real], exact.hidden_states[index][real], rtol=1e-10, atol=1e-12)
        scores = layer.q @ layer.k.transpose(2, 3) * layer.scaling - layer.lse[..., None]
        alpha = scores.masked_fill(~real[:, None, None], float("-inf")).exp()
        torch.testing.assert_close(alpha, exact.attentions[index], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.o, alpha @ layer.v, rtol=1e-9, atol=1e-12)
        assert torch.equal(layer.key_mask, real)
        following = layer.norms["output_norm"]
        norm = layer.modules.output_norm
        following_x = (exact.hidden_states[index + 1] - norm.bias) / norm.weight
        # the LayerNorm's output has mean 0 and its rstd times the input's spread is 1
        torch.testing.assert_close(
            following_x[real].mean(-1), torch.zeros(int(real.sum()), dtype=torch.float64), rtol=0, atol=1e-9
        )
        assert following.rstd.shape == following.mean.shape == (2, 9)


@pytest.mark.parametrize("name", [*OWN_SCORES, *PRE_NORM, *IMAGES])
def test_model_computes_the_same_while_captured(name):
    model = build(name)
    batch = random_batch(model, batch=2, n=9, pads=[0, 4])
    with torch.no_grad(), Float64Throughout():
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        exact = model(**batch)[0]
        model.set_attn_implementation(implementation)
        hooks = hooks_of(model)
        with capture(model) as trace:
            output = model(**batch)[0]
        assert_untouched(model, implementation, hooks)
        for layer in trace.layers:
            merged = layer.o.transpose(1, 2).flatten(2)
            assert merged.shape[:2] == layer.x.shape[:2] and layer.output_weight.flatten(0, 1).shape == (
                merged.shape[2],
                layer.x.shape[2],
            )
            assert (layer.window[1] == 0) == (name in CAUSAL)
    real = batch["attention_mask"].bool() if "attention_mask" in batch and output.dim() == 3 else slice(None)
    torch.testing.assert_close(output[real], exact[real], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "modernbert"])
def test_windows(name):
    model = build(name)
    with torch.no_grad(), capture(model) as trace:
        model(**random_batch(model, batch=2, n=12, pads=[0, 4]))
    windows = {
        "gpt2": [(-1, 0)] * 3,
        "gemma3": [(3, 0), (-1, 0), (3, 0)],
        "modernbert": [(-1, -1), (3, 3), (-1, -1)],
    }
    assert [layer.window for layer in trace.layers] == windows[name]


def test_packed_sequences_are_refused():
    model = build("llama")
    batch = {"input_ids": torch.full((1, 8), 7), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}
    with torch.no_grad(), capture(model), pytest.raises(ValueError, match="got another mask"):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_layernorm_statistics(model, dtype, autocast):
    batch = random_batch(model.to(dtype), batch=1, n=6)
    sums = []
    norm = model.bert.encoder.layer[1].attention.output.LayerNorm
    handle = norm.register_forward_pre_hook(lambda module, args: sums.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), capture(model) as trace:
        model(**batch)
    handle.remove()
    stats, z = trace.layers[1].norms["attention_norm"], sums[0].double()
    assert stats.rstd.dtype == (torch.float64 if sums[0].dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(stats.mean.float(), z.mean(-1).float())
    torch.testing.assert_close(stats.rstd.float(), 1 / (z.var(-1, correction=0) + norm.eps).sqrt().float())


def test_no_mask_without_padding(model):
    with torch.no_grad(), capture(model) as trace:
        model(**random_batch(model, batch=2, n=5))
    assert all(layer.key_mask is None for layer in trace.layers)


def test_second_forward_replaces_the_first(model):
    with torch.no_grad(), capture(model) as trace:
        model(**random_batch(model, batch=1, n=5))
        model(**random_batch(model, batch=2, n=7))
    assert [layer.x.shape[:2] for layer in trace.layers] == [(2, 7)] * 3


def test_restored_after_exception(model):
    with pytest.raises(RuntimeError, match="from inside"), capture(model):
        raise RuntimeError("from inside")
    assert_untouched(model)
    model.bert.encoder.layer[2].output.dense.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError), capture(model):
        model(**random_batch(model, batch=1, n=5))
    assert_untouched(model)


def test_refused_models(model):
    with pytest.raises(ValueError, match="training mode"), capture(model.train()):
        pass
    with pytest.raises(TypeError, match="PreTrainedModel"), capture(torch.nn.Linear(2, 2)):
        pass
    small = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    other = transformers.DebertaModel(transformers.DebertaConfig(**small)).eval()
    with (
        pytest.raises(
            ValueError, match="ignores transformers' attention interface.*known architectures: .* bert,"
        ),
        capture(other),
    ):
        pass
    other = transformers.DebertaV2Model(transformers.DebertaV2Config(**small, conv_kernel_size=3)).eval()
    with pytest.raises(ValueError, match="convolution beside its first layer"), capture(other):
        pass
    other = transformers.T5EncoderModel(
        transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    with (
        pytest.raises(
            ValueError, match="unknown architecture 't5'.*known architectures: .* bert,.*add_an_arch.*md"
        ),
        capture(other),
    ):
        pass
    assert_untouched(model)


def test_model_that_ignores_the_interface(model):
    class OwnAttention(torch.nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states, None

    model.bert.encoder.layer[1].attention.self.forward = OwnAttention().forward
    with torch.no_grad(), capture(model) as trace:
        model(**random_batch(model, batch=1, n=5))
    with pytest.raises(ValueError, match=r"layers \[1\] never called the attention function"):
        trace.layers  # noqa: B018
    with pytest.raises(RuntimeError, match="nothing captured"), capture(model) as trace:
        trace.layers  # noqa: B018


def test_captured_twice(model):
    with capture(model), pytest.raises(RuntimeError, match="captured already"), capture(model):
        pass
    assert_untouched(model)


def test_no_second_capture_while_the_first_begins(model, monkeypatch):
    module, refused = import_module("pyglobenc.hf.trace.capture"), []

    def another_thread_comes(*args):
        with pytest.raises(RuntimeError, match="being captured already"), capture(model):
            pass
        refused.append(True)
        return hooks(*args)

    hooks = module._hooks
    monkeypatch.setattr(module, "_hooks", another_thread_comes)
    with capture(model):
        pass
    assert refused == [True]
    assert_untouched(model)


def test_custom_masks_are_refused(model):
    batch = random_batch(model, batch=1, n=5)
    batch["attention_mask"] = torch.ones(1, 1, 5, 5).tril()
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, n\)"), torch.no_grad(), capture(model):
        model(**batch)


def test_gradients_flow_through(model):
    batch = random_batch(model, batch=2, n=6, pads=[0, 2])
    exact = torch.autograd.grad(model(**batch).logits.sum(), model.bert.embeddings.word_embeddings.weight)[0]
    with capture(model) as trace:
        output = model(**batch)
    assert all(layer.o.requires_grad for layer in trace.layers)
    grad = torch.autograd.grad(output.logits.sum(), model.bert.embeddings.word_embeddings.weight)[0]
    torch.testing.assert_close(grad, exact, rtol=1e-9, atol=1e-12)


def test_extra_modules(model):
    dense = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad(), capture(model, modules=[dense]) as trace:
        model(**random_batch(model, batch=1, n=5))
    given, output = trace.io[dense]
    assert torch.equal(output, dense(given))
    assert_untouched(model)


def test_model_is_freed():
    import weakref

    model = build("bert")
    with torch.no_grad(), capture(model) as trace:
        model(**random_batch(model, batch=1, n=5))
    alive = weakref.ref(model)
    del model, trace
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_a_model_without_layers_is_refused(name):
    with pytest.raises(ValueError, match="has no layers"):
        find_layers(build(name, num_hidden_layers=0))

"""AttnLRP, CP-LRP, GIM and LibraGrad against the papers' rules, by two computations of their own."""

from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product

import pytest
import tiny
import torch
import transformers
from allocations import measure_allocations
from models import ARCHITECTURES, CAUSAL, IMAGES, PRE_NORM, build, classifier, random_batch
from numerics import assert_as_good_as_torch
from published import Float64Throughout
from relevance_by_operations import token_relevance
from ruled_graph import ruled_scores
from sweeps import slow, sweep
from torch import nn

import pyglobenc
from pyglobenc.hf import find_layers
from pyglobenc.methods.gradients import ruled_attention
from pyglobenc.methods.gradients.attribution import GradientAttribution
from pyglobenc.methods.gradients.backward_rules import RULES

FULL = dict(layer_types=["full_attention"] * 3, sliding_window=40, final_logit_softcapping=2.0)


def assert_equal(out: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert-classifier", "vit"])
def test_equals_relevance_by_operations(name, method):
    """Divisions by small q . k lose up to five digits in the explicit computation."""
    model = build(name, **(FULL if name == "gemma2" else {}))
    batch = random_batch(model, batch=2, n=7)
    with Float64Throughout():
        exact, logit = token_relevance(name, model, batch, method, target=1)
        result = GradientAttribution(model, method)(**batch, target=1)
    assert_equal(result.logit, logit)
    assert_equal(result.scores, exact[:, 1:] if name == "vit" else exact)


EVERY = [*ARCHITECTURES, *PRE_NORM, *IMAGES]


def in_turn(names, methods):
    """Return (name, method) for every name, with one method after the other."""
    return list(zip(names, cycle(methods), strict=False))


@pytest.mark.parametrize(
    "name, method",
    sweep(product(EVERY, RULES), [*in_turn(EVERY, RULES), *product(("bert", "llama"), RULES)]),
)
def test_every_architecture_equals_hooks_on_the_eager_graph(name, method):
    model = classifier(name, "last" if name in CAUSAL else "first")
    for side in ("left", "right") if name not in IMAGES else ("right",):
        batch = random_batch(model.encoder, batch=3, n=9, pads=[0, 4, 2], side=side)
        with Float64Throughout():
            result = GradientAttribution(model, method)(**batch, target=1)
            exact, logit = ruled_scores(model, batch, method, target=1)
        if name in IMAGES:
            exact = exact[:, exact.shape[1] - result.scores.shape[1] :]
        else:
            exact = exact * batch["attention_mask"]
        assert_equal(result.logit, logit)
        assert_equal(result.scores, exact)
    attention = "sdpa" if model.encoder.config._attn_implementation == "eager" else "eager"
    if name in ("bert", "llama", "vit"):
        model.encoder.set_attn_implementation(attention)
        with Float64Throughout():
            assert_equal(GradientAttribution(model, method)(**batch, target=1).scores, result.scores)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_many_tokens_of_which_the_head_reads_one(name):
    """The last layer's MLP then skips tokens without a gradient."""
    model = classifier(name, "last" if name in CAUSAL else "first")
    batch = random_batch(model.encoder, batch=3, n=30, pads=[0, 4, 2])
    with Float64Throughout():
        scores = GradientAttribution(model, "attnlrp")(**batch, target=1).scores
        exact, _ = ruled_scores(model, batch, "attnlrp", target=1)
    assert_equal(scores, exact * batch["attention_mask"])


@pytest.mark.parametrize("method", ["cp-lrp", "libragrad"])
def test_relevance_is_conserved_without_biases(method):
    """With constant probabilities every rule passes on what it gets, so the scores add up to the logit."""
    model = build("llama")
    with Float64Throughout():
        result = GradientAttribution(model, method)(**random_batch(model, batch=2, n=9, pads=[0, 3]))
    assert_equal(result.scores.sum(1), result.logit)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "modernbert", "deberta-v3"])
def test_padded_and_several_logits_are_what_each_gives_alone(name, method):
    model = build(name)
    batch = random_batch(model, batch=2, n=8, pads=[0, 3])
    explain = GradientAttribution(model, method)
    padded = explain(**batch, target=1)
    alone = [explain(input_ids=batch["input_ids"][b : b + 1, :n], target=1) for b, n in ((0, 8), (1, 5))]
    for b, one in enumerate(alone):
        n = one.scores.shape[1]
        # transformers rotates queries and keys in float32, whatever the model's dtype is.
        assert_equal(padded.scores[b, :n], one.scores[0], 1e-6 if name in CAUSAL else 1e-9)
        assert not padded.scores[b, n:].any()
    if name in CAUSAL:
        several = explain(**batch, target=1, position=torch.tensor([[7, 4], [4, 2]]))
        assert_equal(several.scores[:, 0], padded.scores)
        assert_equal(several.scores[:, 1, 5:], torch.zeros(2, 3))


@pytest.mark.parametrize(
    "name, method",
    sweep(
        product(("bert", "llama", "gpt2", "gemma2"), RULES),
        in_turn(("bert", "llama", "gpt2", "gemma2"), RULES),
    ),
)
def test_low_precision_is_as_good_as_the_eager_graph(name, method):
    exact, ours, theirs = [], [], []
    for dtype, out in ((torch.float64, exact), (torch.bfloat16, ours)):
        model = classifier(name, "mean", torch.bfloat16).to(dtype)
        for seed in range(6):
            torch.manual_seed(seed)
            batch = random_batch(model.encoder, batch=12, n=16)
            out.append(GradientAttribution(model, method)(**batch, target=1).scores)
            if dtype == torch.bfloat16:
                theirs.append(ruled_scores(model, batch, method, target=1)[0])
    exact, ours, theirs = (torch.cat(parts) for parts in (exact, ours, theirs))
    assert ours.dtype == torch.float32
    assert_as_good_as_torch(ours, exact, theirs.float())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["bert-classifier", "llama", "gpt2"])
def test_checkpointed_blocks(name):
    model = build(name)
    batch = random_batch(model, batch=2, n=7)
    for method in RULES:
        explain = GradientAttribution(model, method)
        model.gradient_checkpointing_disable()
        expected = explain(**batch, target=0).scores
        model.gradient_checkpointing_enable()
        assert torch.equal(explain(**batch, target=0).scores, expected)
        # transformers checkpoints in training mode alone. The flag of the block switches no dropout on.
        calls = []
        for layer in find_layers(model):
            layer.block.training = True
        handle = find_layers(model)[1].output.register_forward_hook(lambda *args, c=calls: c.append(1))
        assert_equal(explain(**batch, target=0).scores, expected, 1e-12)
        assert len(calls) == 2
        handle.remove()
        model.eval()


@pytest.mark.parametrize("method", RULES)
def test_a_checkpoint_that_ends_in_an_activation(method):
    """torch stops the second forward pass there, with an exception inside the activation."""
    model = build("gpt2")
    batch = random_batch(model, batch=2, n=7)
    expected = GradientAttribution(model, method)(**batch).scores
    for layer in model.transformer.h:

        def forward(x, mlp=layer.mlp):
            first = torch.utils.checkpoint.checkpoint(lambda t: mlp.act(mlp.c_fc(t)), x, use_reentrant=False)
            return mlp.c_proj(first)

        layer.mlp.forward = forward
    assert_equal(GradientAttribution(model, method)(**batch).scores, expected, 1e-12)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_model_is_left_as_it_was(name, mode):
    model = build(name, torch.float32)
    model.get_output_embeddings().weight.requires_grad_(False)
    batch = random_batch(model, batch=2, n=6, pads=[0, 2])

    def state():
        modules = list(model.modules())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        replaced = sum("forward" in vars(m) for m in modules)
        flags = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
        return hooks, replaced, flags, model.config._attn_implementation, type(model.config)

    before = state()
    computed = []
    # A hook of a parameter runs if its gradient is computed, whether it is kept or not.
    handles = [p.register_hook(computed.append) for p in model.parameters() if p.requires_grad]
    for method in RULES:
        with mode():
            result = GradientAttribution(model, method)(**{k: v.clone() for k, v in batch.items()})
        assert not result.scores.requires_grad and not result.output.logits.requires_grad
        assert state() == before
    assert not computed
    for handle in handles:
        handle.remove()
    assert len(torch.overrides._get_current_function_mode_stack()) == 0
    handle = find_layers(model)[-1].block.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        GradientAttribution(model, "gim")(**batch)
    handle.remove()
    assert state() == before and len(torch.overrides._get_current_function_mode_stack()) == 0


def test_logits_are_those_of_the_model():
    for name in ("bert-classifier", "gpt2", "llama", "gemma2"):
        model = build(name, torch.float32)
        batch = random_batch(model, batch=2, n=7)
        with torch.no_grad():
            logits = model(**batch).logits
        for method in RULES:
            found = GradientAttribution(model, method)(**batch).output.logits
            torch.testing.assert_close(found, logits)


@pytest.mark.parametrize("method", RULES)
def test_float64_of_a_narrower_model(method):
    model = build("bert-classifier", torch.float32)
    batch = random_batch(model, batch=2, n=7)
    wide = GradientAttribution(model, method, torch.float64)(**batch).scores
    assert_equal(wide, GradientAttribution(model.double(), method)(**batch).scores)


@pytest.mark.parametrize("normalized", [False, True])
def test_every_implementation_of_experts_gives_the_same(normalized):
    scores = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = build("qwen3-moe", torch.float32, norm_topk_prob=normalized)
        model.set_experts_implementation(implementation)
        ids = torch.arange(18).view(2, 9) + 6
        scores.append([GradientAttribution(model, method)(input_ids=ids).scores for method in RULES])
    for others in scores[1:]:
        for one, other in zip(scores[0], others, strict=True):
            # About sixty roundings add up, and terms of both signs cancel to a tenth.
            assert_equal(other, one, 600 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("method", RULES)
def test_normalized_weights_of_experts_have_a_constant_sum(method):
    model = build("qwen3-moe", norm_topk_prob=True)
    batch = random_batch(model, batch=2, n=8)
    with Float64Throughout():
        scores = GradientAttribution(model, method)(**batch, target=1).scores
        exact, _ = ruled_scores(model, batch, method, target=1)
    assert_equal(scores, exact)


class Add(torch.autograd.Function):
    """Not a sum, whatever its name says."""

    @staticmethod
    def forward(ctx, x):
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Gate(nn.Module):
    """A user's MLP; `kind` tells what it computes."""

    def __init__(self, mlp: nn.Module, kind: str):
        super().__init__()
        self.mlp, self.kind = mlp, kind

    def forward(self, x):
        gate, up = self.mlp.gate_proj(x), self.mlp.up_proj(x)
        if self.kind == "own gated":
            return self.mlp.down_proj(up * nn.functional.silu(gate))
        if self.kind == "sigmoid":
            return self.mlp.down_proj(up * gate.sigmoid())
        if self.kind == "maximum":
            return self.mlp.down_proj(torch.maximum(up, gate))
        if self.kind == "in place":
            gate[..., 0].tanh_()
            return self.mlp.down_proj(gate)
        if self.kind == "own function":
            return self.mlp.down_proj(Add.apply(gate))
        if self.kind == "cube":
            return self.mlp.down_proj(up**3)
        return self.mlp.down_proj(up * gate)


class Halved(transformers.activations.SiLUActivation):
    """An activation of transformers' name whose outputs depend on other elements."""

    def forward(self, x):
        return x.softmax(-1)


Halved.__module__ = "transformers.activations"


def test_a_users_gated_mlp_follows_the_rules_whatever_its_name_is():
    model = build("llama")
    batch = random_batch(model, batch=2, n=6)
    for method in RULES:
        expected = GradientAttribution(model, method)(**batch).scores
        own = build("llama")
        for layer in own.model.layers:
            layer.mlp = Gate(layer.mlp, "own gated")
            layer.mlp.down_proj = layer.mlp.mlp.down_proj
        assert_equal(GradientAttribution(own, method)(**batch).scores, expected)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("sigmoid", "attnlrp has no rule for an operation of this model, sigmoid in Gate"),
        ("maximum", "attnlrp has no rule for an operation of this model, maximum in Gate"),
        ("cube", "attnlrp has no rule for an operation of this model, pow in Gate"),
        ("in place", "attnlrp has no rule for an operation of this model"),
        ("own function", "gim has no rule for an operation of this model, AddBackward"),
        ("product", "cp-lrp has no rule for an operation of this model, mul in Gate"),
    ],
)
def test_operations_without_a_rule_are_refused_by_name(kind, message):
    model = build("llama")
    layer = model.model.layers[1]
    layer.mlp = Gate(layer.mlp, kind)
    layer.mlp.down_proj = layer.mlp.mlp.down_proj
    method = message.split()[0]
    with pytest.raises(ValueError, match=message):
        GradientAttribution(model, method)(**random_batch(model, batch=1, n=5))


def test_refusals():
    model = build("llama")
    batch = random_batch(model, batch=1, n=5)
    model.model.layers[0].mlp.act_fn = Halved()
    with pytest.raises(ValueError, match="libragrad has no rule for Halved, which isn't an elementwise"):
        GradientAttribution(model, "libragrad")(**batch)
    model.model.layers[0].mlp.act_fn = transformers.activations.ACT2FN["laplace"]
    with pytest.raises(ValueError, match="has no rule for LaplaceActivation"):
        GradientAttribution(model, "attnlrp")(**batch)
    model = build("llama")
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x: norm.weight * nn.functional.normalize(x, dim=-1)
    normalized = GradientAttribution(model, "attnlrp")(**batch).scores
    norm.forward = lambda x: norm.weight * x / x.norm(dim=-1, keepdim=True).detach()
    assert_equal(GradientAttribution(model, "attnlrp")(**batch).scores, normalized)
    norm.forward = lambda x: norm.weight * x / (1 + x.abs().amax(-1, keepdim=True)).log()
    assert GradientAttribution(model, "attnlrp")(**batch).scores.any()
    norm.forward = lambda x: norm.weight * x * (1 + x.abs().amax(-1, keepdim=True)).reciprocal()
    with pytest.raises(ValueError, match="attnlrp has no rule"):
        GradientAttribution(model, "attnlrp")(**batch)
    norm.forward = lambda x: norm.weight / (2 + x.tanh()) * x.tanh() / (3 + x.tanh())
    with pytest.raises(ValueError, match="attnlrp has no rule for an operation of this model, div in"):
        GradientAttribution(model, "attnlrp")(**batch)
    with pytest.raises(ValueError, match="method must be one of .* attnlrp"):
        GradientAttribution(model, "attn-lrp")


@pytest.mark.parametrize(
    "name, method", [("llama", "attnlrp"), slow("gemma2", "attnlrp"), slow("gemma2", "gim")]
)
def test_no_array_is_quadratic(name, method):
    n, tile = 2304, 64
    settings = dict(max_position_embeddings=n)
    model = build(
        name, torch.float32, **settings, **(FULL | dict(sliding_window=n) if name == "gemma2" else {})
    )
    batch = random_batch(model, batch=1, n=n)
    explain = GradientAttribution(model, method)
    explain(**random_batch(model, batch=1, n=16))
    used = measure_allocations(lambda: explain(**batch))
    # The largest arrays are the logits (n, 97), the MLP's (n, 192), or a tile of queries with all keys.
    heads = model.config.num_attention_heads
    assert used.largest <= 4 * max(192 * n, heads * tile * n if name == "gemma2" else 0)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert-classifier"])
def test_a_tempered_softmax_in_blocks_is_that_of_two_attentions(name, monkeypatch):
    model = build(name, max_position_embeddings=150)
    batch = random_batch(model, batch=2, n=140, pads=[0, 9], side="left")
    found = GradientAttribution(model, "gim")(**batch, target=1)
    # A GPU computes it with torch's kernels.
    monkeypatch.setattr(ruled_attention, "_by_blocks", lambda q, mod: False)
    assert_equal(found.scores, GradientAttribution(model, "gim")(**batch, target=1).scores, 1e-9)


def test_threads_run_methods_of_one_model_at_the_same_time():
    model = build("gpt2")
    batch = random_batch(model, batch=2, n=7)
    expected = {method: GradientAttribution(model, method)(**batch).scores for method in RULES}
    with torch.no_grad():
        logits = model(**batch).logits

    def explain(method):
        for _ in range(5):
            assert torch.equal(GradientAttribution(model, method)(**batch).scores, expected[method])
            with torch.no_grad():
                assert_equal(model(**batch).logits, logits, 1e-12)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(explain, RULES))


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("name", ["bert-classifier", "llama"])
def test_under_autocast_the_scores_are_those_of_the_model_in_bfloat16(name, method):
    model = build(name, torch.float32)
    batch = random_batch(model, batch=4, n=16)
    exact = GradientAttribution(model, method)(**batch, target=1).scores
    with torch.autocast("cpu", torch.bfloat16):
        result = GradientAttribution(model, method)(**batch, target=1)
    assert result.scores.dtype == torch.float32 and not torch.equal(result.scores, exact)
    # bfloat16 keeps 8 bits. Three layers of about ten roundings each lose at most five of them here.
    assert_equal(result.scores, exact, 2.0**-3)


@pytest.mark.parametrize("method", RULES)
def test_explain_takes_the_names(method):
    model, texts = tiny.classifier(), ["the good film is deep, filming.", "a film"]
    for a in pyglobenc.explain(model, tiny.tokenizer(), texts, method, progress=False):
        exact = GradientAttribution(model, method)(input_ids=torch.tensor([a.token_ids])).scores[0]
        assert_equal(torch.tensor(a.scores), exact)
        assert a.target_kind == "class"

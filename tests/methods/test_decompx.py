"""DecompX equals the equations on all decomposed vectors; see `decompx.direct` in tests/support."""

from functools import cache
from itertools import cycle, product

import pytest
import torch
import transformers
from allocations import measure_allocations
from decompx import direct
from models import SMALL, build, random_batch, randomize
from published import Float64Throughout
from sweeps import sweep
from tiny import classifier as tiny
from tiny import tokenizer
from torch import nn

from pyglobenc import DecompX, GradientAttribution, explain
from pyglobenc.methods.decompx import absdot
from pyglobenc.methods.decompx.decompx import BIASES

TOLERANCE = 1e-9
# Where the Linear modules of the heads are, from the last layer's output up.
HEADS = {
    "bert-classifier": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
    "albert": ("albert.pooler", "classifier"),
    "deberta-v3": ("pooler.dense", "classifier"),
}
ENCODERS = ("bert", "xlm-roberta", "camembert", "albert-groups", "mpnet", "deberta-v2")


class Classifier(nn.Module):
    """A user's head on the first token, the last real one, or the mean of the real ones."""

    def __init__(self, encoder: nn.Module, reads: str):
        super().__init__()
        self.encoder, self.reads = encoder, reads
        self.dense, self.out = nn.Linear(48, 20), nn.Linear(20, 3, bias=False)

    def forward(self, **batch):
        h = self.encoder(**batch).last_hidden_state
        return self.out(self.dense(torch.einsum("bi,bid->bd", pool(batch, self.reads), h)).tanh())


def pool(batch: dict, reads: str) -> torch.Tensor:
    mask = batch["attention_mask"].double()
    if reads == "mean":
        return mask / mask.sum(1, keepdim=True)
    at = mask.argmax(1) if reads == "first" else (mask * torch.arange(mask.shape[1])).argmax(1)
    return nn.functional.one_hot(at, mask.shape[1]).double()


@cache
def classifier(name: str, reads: str) -> Classifier:
    return randomize(Classifier(build(name), reads)).double().eval()


@pytest.fixture
def small_tiles(monkeypatch):
    # 3 tokens' vectors in a tile, for 11 tokens
    monkeypatch.setattr(absdot, "TILE_VECTORS", 33)


def assert_equal(result, exact: torch.Tensor, bias: str) -> None:
    """Compare a result with what each source gives, (B, n + 1); the last source is the bias token."""
    close = TOLERANCE * exact.abs().max()
    assert (result.scores - exact[:, :-1]).abs().max() <= close
    if bias != "none":
        assert (result.bias - exact[:, -1]).abs().max() <= close
    assert (result.scores.sum(1) + result.bias - result.logit).abs().max() <= close
    assert float(result.error.max()) <= TOLERANCE


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", HEADS)
def test_classifiers_equal_the_equations(name, bias, small_tiles):
    model = build(name)
    head, explain = [model.get_submodule(path) for path in HEADS[name]], DecompX(model)
    batch = random_batch(model, batch=3, n=11, pads=[0, 4, 7])
    pooled = nn.functional.one_hot(torch.zeros(3, dtype=torch.long), 11)
    with Float64Throughout():
        exact = direct(model, batch, bias, head, pooled)
        assert_equal(explain(**batch, target=1, bias=bias), exact[..., 1], bias)
        contrast = explain(**batch, target=[0, 1, 0], contrast=[1, 0, 1], bias=bias)
    sign = torch.tensor([1, -1, 1])[:, None]
    assert_equal(contrast, (exact[..., 0] - exact[..., 1]) * sign, bias)


READS = ("first", "last", "mean")


@pytest.mark.parametrize(
    "name, reads, bias",
    sweep(product(ENCODERS, READS, BIASES), zip(cycle(ENCODERS), cycle(READS), [*BIASES] * 3, strict=False)),
)
def test_your_own_heads_equal_the_equations(name, reads, bias, small_tiles):
    model = classifier(name, reads)
    side = "left" if name == "bert" else "right"
    batch = random_batch(model.encoder, batch=2, n=11, pads=[0, 5], side=side)
    with Float64Throughout():
        exact = direct(model, batch, bias, [model.dense, model.out], pool(batch, reads))
        assert_equal(DecompX(model)(**batch, target=2, bias=bias), exact[..., 2], bias)


@pytest.mark.parametrize("kept", range(5))
def test_memory_changes_no_score(kept, small_tiles):
    model = build("roberta")
    batch = random_batch(model, batch=2, n=11, pads=[0, 2])
    expected = DecompX(model)(**batch).scores
    # a tile of 3 vectors of each of 11 tokens, in float64
    scores = DecompX(model, memory=kept * 3 * 11 * 48 * 8)(**batch).scores
    assert (scores - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("bias", BIASES)
def test_padding_pairs_and_embeddings_change_nothing(bias):
    model = build("bert-classifier")
    batch = random_batch(model, batch=3, n=12, pads=[0, 3, 6], side="left")
    batch["token_type_ids"] = (torch.arange(12) % 5 > 2).long().expand(3, -1)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # BERT reads position 0 whatever the mask is, so a head of one's own reads the first real token.
    wrapped = randomize(Classifier(model.bert, "first")).double().eval()
    together = DecompX(wrapped)(**batch, bias=bias)
    for row, start in enumerate([0, 3, 6]):
        alone = {key: value[row : row + 1, start:] for key, value in batch.items()}
        one = DecompX(wrapped)(**alone, bias=bias)
        size = one.scores.abs().max()
        assert (together.scores[row, start:] - one.scores[0]).abs().max() <= TOLERANCE * size
        assert (together.scores[row, :start] == 0).all()
        assert (together.bias[row] - one.bias[0]).abs() <= TOLERANCE * size
        embeddings = model.get_input_embeddings()(alone.pop("input_ids"))
        again = DecompX(wrapped)(inputs_embeds=embeddings, **alone, bias=bias)
        assert (again.scores - one.scores).abs().max() <= TOLERANCE * size


def test_logits_of_tokens_and_spans():
    settings = transformers.BertConfig(**SMALL)
    tokens = randomize(transformers.BertForTokenClassification(settings)).double().eval()
    batch = random_batch(tokens, batch=2, n=9, pads=[0, 3])
    at = torch.tensor([4, 2])
    exact = direct(tokens, batch, "absdot", [tokens.classifier], nn.functional.one_hot(at, 9))
    assert_equal(DecompX(tokens)(**batch, target=1, position=at), exact[..., 1], "absdot")
    spans = randomize(transformers.BertForQuestionAnswering(settings)).double().eval()
    exact = direct(spans, batch, "equal", [spans.qa_outputs], nn.functional.one_hot(at, 9))
    result = DecompX(spans)(**batch, target="end", position=at, bias="equal")
    assert_equal(result, exact[..., 1], "equal")
    assert result.target.tolist() == [1, 1]


@pytest.mark.parametrize("name", ["bert-classifier", "roberta", "distilbert"])
def test_without_biases_it_is_cp_lrp_but_for_the_first_values(name):
    model = build(name)
    first = model.base_model.transformer if name == "distilbert" else model.base_model.encoder
    value = first.layer[0].attention.v_lin if name == "distilbert" else first.layer[0].attention.self.value
    nn.init.zeros_(value.bias)
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    other = GradientAttribution(model, "cp-lrp")(**batch, target=1).scores
    assert (DecompX(model)(**batch, target=1, bias="none").scores - other).abs().max() <= (
        TOLERANCE * other.abs().max()
    )


def test_an_mlp_in_pieces_is_the_same():
    model = build("bert-classifier", chunk_size_feed_forward=4)
    batch = random_batch(model, batch=2, n=12)
    whole = DecompX(build("bert-classifier"))(**batch)
    assert (DecompX(model)(**batch).scores - whole.scores).abs().max() <= 1e-12 * whole.scores.abs().max()


def test_half_precision_and_float64_arithmetic():
    exact_model = build("bert-classifier")
    batch = random_batch(exact_model, batch=2, n=16, pads=[0, 3])
    for bias in BIASES:
        options = dict(target=1, bias=bias)
        exact = DecompX(exact_model)(**batch, **options)
        single = build("bert-classifier", torch.float32)
        wide = DecompX(single, dtype=torch.float64)(**batch, **options)
        narrow = DecompX(single)(**batch, **options)
        half = DecompX(build("bert-classifier", torch.bfloat16))(**batch, **options)
        assert (wide.scores.dtype, narrow.scores.dtype) == (torch.float64, torch.float32)
        assert half.scores.dtype == torch.float32
        size = exact.scores.abs().max()
        # The weights are the same numbers rounded to float32, which moves the scores by some units.
        for result, units in ((wide, torch.float32), (narrow, torch.float32), (half, torch.bfloat16)):
            difference = (result.scores - exact.scores).abs().max() / size
            assert difference <= 64 * torch.finfo(units).eps
        assert float(wide.error.max()) <= TOLERANCE < float(half.error.max())


def test_autocast_changes_the_forward_pass_alone():
    model = build("bert-classifier", torch.float32)
    batch = random_batch(model, batch=2, n=16, pads=[0, 3])
    exact = DecompX(build("bert-classifier"))(**batch, target=1)
    with torch.autocast("cpu", torch.bfloat16):
        result = DecompX(model)(**batch, target=1)
    assert result.logit.dtype == torch.bfloat16 and result.scores.dtype == torch.float32
    difference = (result.scores - exact.scores).abs().max()
    assert difference <= 64 * torch.finfo(torch.bfloat16).eps * exact.scores.abs().max()


def test_large_attention_scores_are_attributed_in_float64():
    model = build("bert-classifier")
    for layer in model.bert.encoder.layer:
        layer.attention.self.query.weight.data *= 900
    batch = random_batch(model, batch=2, n=12, pads=[0, 3])
    exact = DecompX(model)(**batch, target=1)
    result = DecompX(model.float())(**batch, target=1)
    assert result.scores.dtype == torch.float64 and float(result.error.max()) <= 1e-4
    assert (result.scores - exact.scores).abs().max() <= 1e-3 * exact.scores.abs().max()


def test_adapters_count_merged_or_not():
    peft = pytest.importorskip("peft")
    parts = ["key", "value", "intermediate.dense", "attention.output.dense"]
    config = peft.LoraConfig(target_modules=parts, init_lora_weights=False)
    model = peft.get_peft_model(build("bert-classifier"), config).double().eval()
    batch = random_batch(build("bert-classifier"), batch=2, n=9, pads=[0, 3])
    apart = DecompX(model)(**batch, target=1).scores
    merged = DecompX(model.merge_and_unload())(**batch, target=1).scores
    assert (apart - merged).abs().max() <= TOLERANCE * merged.abs().max()


def hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def test_the_model_is_left_as_it_was():
    model = build("bert-classifier", torch.float32)
    model.classifier.weight.requires_grad_(False)
    flags, implementation = [p.requires_grad for p in model.parameters()], model.config._attn_implementation
    batch = random_batch(model, batch=1, n=6)
    with torch.inference_mode():
        DecompX(model)(**{key: value.clone() for key, value in batch.items()})
    model.bert.pooler.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        DecompX(model)(**batch)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == 1 and model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    "name, reason",
    [
        ("vit", "normalise before the attention and the MLP"),
        ("gpt2", "normalise before the attention and the MLP"),
        ("llama", "normalise before the attention and the MLP"),
        ("modernbert", "normalise before the attention and the MLP"),
        ("nomic-bert", "its MLP is gated"),
    ],
)
def test_other_layers_are_refused(name, reason):
    with pytest.raises(ValueError, match=f"DecompX: the decomposition is defined for BERT.*{reason}"):
        DecompX(build(name))


def test_decoders_and_other_activations_are_refused():
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True)).eval()
    with pytest.raises(ValueError, match="its attention is causal or local"):
        DecompX(model)(**random_batch(model, 1, 5), position=2)
    model = build("bert-classifier", hidden_act="sigmoid")
    with pytest.raises(ValueError, match="the activation 'sigmoid' isn't 0 at 0"):
        DecompX(model)(**random_batch(model, 1, 5))


@pytest.mark.parametrize("name", ["gelu_new", "relu", "silu", "relu2", "tanh"])
def test_every_activation_through_the_origin(name):
    model = build("bert-classifier", hidden_act=name)
    batch = random_batch(model, batch=2, n=7, pads=[0, 2])
    head = [model.bert.pooler.dense, model.classifier]
    pooled = nn.functional.one_hot(torch.zeros(2, dtype=torch.long), 7)
    exact = direct(model, batch, "absdot", head, pooled)
    assert_equal(DecompX(model)(**batch, target=0), exact[..., 0], "absdot")


class Odd(Classifier):
    """Heads that aren't chains of Linear modules and activations."""

    def forward(self, **batch):
        h = self.encoder(**batch).last_hidden_state
        if self.reads == "tokens":
            return self.out(self.dense(h).mean(1))
        if self.reads == "max":
            return self.out(self.dense(h.amax(1)))
        return self.out(self.dense(h[:, 0]).softmax(-1))


@pytest.mark.parametrize("reads", ["tokens", "max", "softmax"])
def test_other_heads_are_refused(reads):
    model = randomize(Odd(build("bert"), reads)).double().eval()
    with pytest.raises(ValueError, match="DecompX: the head"):
        DecompX(model)(**random_batch(model.encoder, 2, 6))


def test_a_head_with_a_layer_norm_is_refused():
    model = randomize(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))).eval()
    with pytest.raises(ValueError, match=r"cls\.predictions\.transform\.LayerNorm is a layer norm"):
        DecompX(model)(**random_batch(model, 1, 6), position=2)


CHANGES = {
    "attention.self.value": lambda module, args, out: out * 1.001,
    "intermediate.dense": lambda module, args, out: out + 0.001,
    "output.dense": lambda module, args, out: out * 1.001,
    "attention.output.dense": lambda module, args, out: out * 1.001,
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_layer_that_computes_something_else_is_refused(part):
    model = build("bert-classifier", torch.float32)
    model.bert.encoder.layer[1].get_submodule(part).register_forward_hook(CHANGES[part])
    with pytest.raises(ValueError, match=r"layer 1 \(counted from 0\)|layer\.1\."):
        DecompX(model)(**random_batch(model, 2, 16))


def test_another_activation_than_the_config_names_is_refused():
    model = build("bert-classifier")
    model.bert.encoder.layer[2].intermediate.intermediate_act_fn = nn.Softmax(-1)
    with pytest.raises(ValueError, match="something else than the config's activation 'gelu'"):
        DecompX(model)(**random_batch(model, 1, 6))


def test_arguments_are_refused_by_name():
    model = build("bert-classifier")
    batch = random_batch(model, 2, 6)
    for options, message in (
        (dict(bias="abs"), "DecompX: bias must be one of absdot, equal, cls, token, none, got 'abs'"),
        (dict(target=2), "DecompX: target must lie in"),
        (dict(target=0, contrast=0), "contrast must be another class"),
        (dict(position=1), "position names a token's logit"),
    ):
        with pytest.raises(ValueError, match=message):
            DecompX(model)(**batch, **options)
    with pytest.raises(ValueError, match="memory must be a number of bytes"):
        DecompX(model, memory=-1)
    with pytest.raises(ValueError, match="no head to explain"):
        DecompX(model.bert)(**batch)
    model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="classifier.weight"):
        DecompX(model)(**batch)


def test_one_pass_holds_a_few_numbers_a_token_and_absdot_some_a_pair(monkeypatch):
    model = build("bert-classifier", torch.float32, max_position_embeddings=1024)
    n, d, units, heads, tile = 1024, 48, 80, 4, 1 << 18
    batch, explain = random_batch(model, batch=1, n=n), DecompX(model)
    used = measure_allocations(lambda: explain(**batch, bias="token"))
    # The states and slopes of three layers, and blocks of pairs.
    assert used.largest <= 4 * max(tile, units * n) and used.peak <= 4 * (4 * tile + n * units * 20)
    # The probabilities of two layers, the shares of three, and tiles of 512 vectors.
    monkeypatch.setattr(absdot, "TILE_VECTORS", vectors := 512)
    n = 192
    batch, explain = random_batch(model, batch=1, n=n), DecompX(model, memory=0)
    used = measure_allocations(lambda: explain(**batch))
    assert used.largest <= 4 * max(5 * n * n, vectors * units)
    bound = 4 * (n * n * (2 * heads + 3 * 5 + 2) + 8 * vectors * units + n * units * 20)
    assert used.peak <= bound < 4 * n * n * d


def test_explain_takes_texts_and_pairs():
    texts = ["the good film is deep, filming.", "a film", ("a film", "is deep")]
    found = explain(
        tiny(), tokenizer(), texts, method="decompx", target="GOOD", contrast="BAD", progress=False
    )
    for text, a in zip(texts, found, strict=True):
        one = tokenizer()(
            *(text if isinstance(text, tuple) else (text,)), truncation=False, return_tensors="pt"
        )
        result = DecompX(tiny())(**one, target=1, contrast=0)
        assert abs(torch.tensor(a.scores) - result.scores[0]).max() <= 1e-12 * result.scores.abs().max()
        assert abs(a.scores.sum() - float(result.logit)) <= 1e-12 * result.scores.abs().sum()
        assert a.target_name == "GOOD" and a.log_scale == 0 and a.error < 1e-12

"""The similarity of two texts' embeddings, and rerankers, against autograd on transformers' own states."""

import numpy as np
import pytest
import torch
from models import build
from tiny import classifier, tokenizer
from torch import nn

import pyglobenc
from pyglobenc import explain, explain_similarity
from pyglobenc.methods.precision.reliability import DIGITS_GONE
from pyglobenc.methods.registry import METHODS

A, B = "the good film. deep", "a film, filming"
NAMES = ["input_ids", "token_type_ids", "attention_mask"]
POOLED = {
    "mean": lambda states: states[0].mean(0),
    "cls": lambda states: states[0, 0],
    "lasttoken": lambda states: states[0, -1],
}


class Transformer(nn.Module):
    """Stands for the first module of a SentenceTransformer."""

    def __init__(self, model):
        super().__init__()
        self.auto_model = model

    def forward(self, features):
        kept = {name: features[name] for name in ("input_ids", "attention_mask")}
        return features | {"token_embeddings": self.auto_model(**kept).last_hidden_state}


class Pooling(nn.Module):
    """Stands for a pooling of a SentenceTransformer, followed by a Dense and a Normalize module."""

    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, 7, dtype=torch.float64)

    def forward(self, features):
        mask = features["attention_mask"][..., None]
        pooled = (features["token_embeddings"] * mask).sum(1) / mask.sum(1)
        return features | {"sentence_embedding": nn.functional.normalize(self.dense(pooled).tanh())}


class SentenceTransformer(nn.Sequential):
    """Stands for the class of this name where sentence-transformers isn't installed."""

    def __init__(self, model, tokenizer):
        super().__init__(Transformer(model), Pooling(model.config.hidden_size))
        self.tokenizer, self.max_seq_length, self.default_prompt_name = tokenizer, 20, None

    def tokenize(self, texts):
        (text,) = texts
        return self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.max_seq_length)

    def forward(self, features):
        for module in self:
            features = module(features)
        return features


def state(model, ids):
    """Return the first layer's input and the last hidden states of a text."""
    output = model.base_model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[0], output.last_hidden_state


def assert_is_gradient_x_input(pair, model, embed):
    first, last = zip(*(state(model, a.token_ids) for a in pair), strict=True)
    value = torch.cosine_similarity(embed(last[0]), embed(last[1]), dim=0)
    assert pair.similarity == pytest.approx(float(value.detach()), rel=1e-9)
    for a, h, grad in zip(pair, first, torch.autograd.grad(value, first), strict=True):
        exact = (grad * h).sum(-1)[0].detach().numpy()
        assert np.abs(a.scores - exact).max() <= 1e-9 * np.abs(exact).max()


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "qwen3", "bert-classifier"])
def test_equals_direct_computation(name, pooling):
    model = build(name)
    pair = explain_similarity(model, tokenizer(), A, B, pooling=pooling)
    assert [a.text for a in pair] == [A, B] and {a.target_name for a in pair} == {"cosine similarity"}
    assert pair[0].predictions == [("cosine similarity", pair.similarity)] and pair[0].label is None
    assert_is_gradient_x_input(pair, model, POOLED[pooling])


def test_a_sentence_transformers_own_modules():
    model = build("bert")
    whole = SentenceTransformer(model, tokenizer()).eval()
    pair = explain_similarity(whole, None, A, B)

    def embed(states):
        mask = torch.ones(states.shape[:2])
        return whole[1]({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"][0]

    assert_is_gradient_x_input(pair, model, embed)
    with pytest.raises(ValueError, match="at most 20 fit"):
        explain_similarity(whole, None, "film " * 30, B)
    assert explain_similarity(whole, None, "film " * 30, B, long="truncate")[0].cut == 12
    with pytest.raises(ValueError, match="has a pooling of its own"):
        explain_similarity(whole, None, A, B, pooling="mean")
    whole.tokenize = lambda texts: {"input_ids": torch.tensor([[2, 5, 3]])}
    with pytest.raises(ValueError, match="makes other tokens of this text than its tokenizer"):
        explain_similarity(whole, None, A, B)
    whole.default_prompt_name = "query"
    with pytest.raises(ValueError, match="puts its prompt 'query' before texts"):
        explain_similarity(whole, None, A, B)


def test_the_real_library(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers isn't installed")
    build("bert", torch.float32).save_pretrained(tmp_path)
    tokenizer(model_max_length=40).save_pretrained(tmp_path)
    whole = library.SentenceTransformer(str(tmp_path), device="cpu").double()
    pair = explain_similarity(whole, None, A, B)
    vectors = whole.encode([A, B], convert_to_tensor=True)
    assert pair.similarity == pytest.approx(float(torch.cosine_similarity(*vectors, dim=0)), rel=1e-9)
    assert_is_gradient_x_input(pair, whole[0].auto_model, POOLED["mean"])
    whole.truncate_dim = 9
    pair = explain_similarity(whole, None, A, B)
    vectors = whole.encode([A, B], convert_to_tensor=True)
    assert vectors.shape == (2, 9)
    assert pair.similarity == pytest.approx(float(torch.cosine_similarity(*vectors, dim=0)), rel=1e-9)
    assert_is_gradient_x_input(pair, whole[0].auto_model, lambda states: states[0].mean(0)[:9])


@pytest.mark.parametrize("name, pooling", [("bert", "mean"), ("qwen3", "lasttoken")])
def test_integrated_gradients_are_complete(name, pooling):
    model, tok = build(name), tokenizer()
    pair = explain_similarity(model, tok, A, B, "integrated-gradients", pooling=pooling)
    vectors = [POOLED[pooling](state(model, a.token_ids)[1]) for a in pair]
    for number, a in enumerate(pair):
        base = [
            token if flag else tok.mask_token_id for token, flag in zip(a.token_ids, a.special, strict=True)
        ]
        other = POOLED[pooling](state(model, base)[1])
        change = pair.similarity - torch.cosine_similarity(other, vectors[1 - number], dim=0)
        gap = abs(float(a.scores.sum() - change.detach())) / float(np.abs(a.scores).sum())
        assert gap == pytest.approx(a.error, abs=1e-9) and a.error <= DIGITS_GONE


@pytest.mark.parametrize("method", ["saliency", "gradient-x-input-norm", "occlusion", "gradient-rollout"])
def test_other_methods_explain_the_similarity(method):
    model = build("bert")
    pair = explain_similarity(model, tokenizer(), A, B, method, pooling="mean", merge_words=True)
    assert all(np.isfinite(a.scores).all() and a.scores.any() and a.method == method for a in pair)
    if method == "occlusion":
        first, second = (a.token_ids for a in pair)
        changed = [*first[:2], 4, *first[3:]]
        a, b, without = (POOLED["mean"](state(model, ids)[1]) for ids in (first, second, changed))
        fall = torch.cosine_similarity(a, b, dim=0) - torch.cosine_similarity(without, b, dim=0)
        assert pair[0].scores[2] == pytest.approx(float(fall.detach()), rel=1e-9)
    assert pair.to_html().count("<section>") == 2 and pair.to_png()


def test_saved_and_refused(tmp_path):
    model, tok = build("bert"), tokenizer()
    pair = explain_similarity(model, tok, A, B, "saliency", pooling="cls")
    pair.save(tmp_path / "a.json")
    assert pyglobenc.load(tmp_path / "a.json") == pair
    for arguments, options, error, message in (
        ((A, B), {}, ValueError, "pooling must be one of mean, cls, lasttoken, .* got None"),
        ((A, B, "globenc"), dict(pooling="cls"), ValueError, "globenc explains a position"),
        ((A, B), dict(pooling="cls", long="windows"), ValueError, "belongs to a whole text"),
        ((A, ("a", "b")), dict(pooling="cls"), TypeError, "text_b must be a string, got \\('a'"),
        ((A, " "), dict(pooling="cls"), ValueError, "nothing but white space|holds nothing"),
    ):
        with pytest.raises(error, match=message):
            explain_similarity(model, tok, *arguments, **options)
    with pytest.raises(TypeError, match="needs its tokenizer"):
        explain_similarity(model, None, A, B, pooling="cls")
    with pytest.raises(ValueError, match="training mode"):
        explain_similarity(build("bert").train(), tok, A, B, pooling="cls")
    assert not model.training and not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["bert-classifier", "roberta", "modernbert", "electra"])
def test_rerankers(name):
    """A cross-encoder with one logit reads a pair of texts."""
    model, tok = build(name, num_labels=1), tokenizer(model_input_names=NAMES)
    a = explain(model, tok, (A, B), "gradient-x-input")
    batch = tok(A, B, return_tensors="pt", truncation=False)
    if name == "modernbert":
        del batch["token_type_ids"]
    output = model(**batch, output_hidden_states=True)
    h = output.hidden_states[0]
    exact = (torch.autograd.grad(output.logits[0, 0], h)[0] * h).sum(-1)[0].detach().numpy()
    assert np.abs(a.scores - exact).max() <= 1e-9 * np.abs(exact).max()
    assert a.token_ids == batch["input_ids"][0].tolist() and a.text_pair == B
    assert a.predictions == [("LABEL_0", pytest.approx(float(output.logits.detach()[0, 0]), rel=1e-9))]
    for method in METHODS:
        if METHODS[method].models == "every model" and name == "bert-classifier":
            b = explain(model, tok, [(A, B), ("a", "b c")], method, progress=False)
            one = explain(model, tok, (A, B), method)
            assert np.allclose(b[0].scores, one.scores, rtol=1e-9, atol=1e-12) and len(b[0]) == len(a)


def test_cross_encoders():
    model, tok = classifier(), tokenizer()
    wrapped = nn.Sequential(Transformer(model))
    assert np.array_equal(
        explain(wrapped, tok, (A, B), "lrp").scores, explain(model, tok, (A, B), "lrp").scores
    )
    # A language model's score is computed by a module after it.
    kind = type("CrossEncoder", (nn.Sequential,), {})
    with pytest.raises(ValueError, match=r"computes its score after the transformers model \(Identity\)"):
        explain(kind(Transformer(model), nn.Identity()), tok, (A, B), "saliency")


def test_the_real_cross_encoder(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers isn't installed")
    build("bert-classifier", torch.float32, num_labels=1).save_pretrained(tmp_path)
    tokenizer(model_max_length=40).save_pretrained(tmp_path)
    whole = library.CrossEncoder(str(tmp_path), device="cpu").double()
    a = explain(whole, whole.tokenizer, (A, B), "saliency")
    score = whole.predict([(A, B)], activation_fn=nn.Identity())[0]
    # The library returns float32.
    assert a.predictions[0][1] == pytest.approx(float(score), rel=1e-6)

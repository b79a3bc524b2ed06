"""A next token or a filled mask by its text or id, labels of classes by their names, and contrasts."""

import numpy as np
import pytest
import torch
import transformers
from models import SMALL, build, randomize
from tiny import by_bytes, classifier, tokenizer

import pyglobenc
from pyglobenc import explain
from pyglobenc.inputs.targets import token_named
from pyglobenc.viz.common import caption

TEXT = "the good film"
MASKED = "the [MASK] film is deep"
MASKED_MODELS = {
    "bert": ("BertConfig", "BertForMaskedLM"),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM"),
    "albert": ("AlbertConfig", "AlbertForMaskedLM"),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM"),
}


def masked_model(name):
    own = dict(embedding_size=32) if name == "albert" else {}
    own |= dict(pad_token_id=0, cls_token_id=2, sep_token_id=3) if name == "modernbert" else {}
    config = getattr(transformers, MASKED_MODELS[name][0])(**SMALL | own)
    return randomize(getattr(transformers, MASKED_MODELS[name][1])(config)).double().eval()


def direct(model, ids, position, target, contrast=None):
    """Gradient x input of a token's logit, or of a difference of two, by transformers' own hidden states."""
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    logits = output.logits[0, position] if position is not None else output.logits[0]
    value = logits[target] - (0 if contrast is None else logits[contrast])
    h = output.hidden_states[0]
    return (torch.autograd.grad(value, h)[0] * h).sum(-1)[0].detach()


def assert_same(a, exact):
    assert np.abs(a.scores - exact.numpy()).max() <= 1e-9 * float(exact.abs().max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_next_token_by_its_text(name):
    model, tok = build(name), tokenizer()
    texts = [TEXT, "a b c the deep film, good", "film"]
    several = explain(model, tok, texts, "gradient-x-input", target="film", contrast="deep", progress=False)
    film, deep = tok.convert_tokens_to_ids(["film", "deep"])
    for a in several:
        assert_same(a, direct(model, a.token_ids, -1, film, deep))
        assert (a.target, a.target_name, a.contrast, a.contrast_name) == (film, "film", deep, "deep")
    by_id = explain(model, tok, TEXT, "gradient-x-input", target=film, contrast=deep)
    assert_same(by_id, torch.tensor(several[0].scores))
    for method in ("gradient-rollout", "integrated-gradients", "occlusion"):
        a = explain(model, tok, TEXT, method, target="film", contrast="deep")
        b = explain(model, tok, TEXT, method, target=film, contrast=deep)
        assert np.array_equal(a.scores, b.scores) and a.target == film
        assert not np.array_equal(a.scores, explain(model, tok, TEXT, method, target="film").scores)


def test_the_contrast_is_saved_and_shown(tmp_path):
    a = explain(build("llama"), tokenizer(), TEXT, "saliency", target="film", contrast="deep")
    a.save(tmp_path / "a.json")
    a.save(tmp_path / "a.safetensors")
    assert pyglobenc.load(tmp_path / "a.json") == pyglobenc.load(tmp_path / "a.safetensors") == a
    assert ("against", f"deep ({a.contrast})") in caption(a) and a.settings["contrast"] == "deep"


def test_readings_of_a_text():
    tok = by_bytes("P a", "Pa r", "Ġ Pa", "o k", "Ġ ok", unk_token="!")
    name = tok.convert_ids_to_tokens
    assert name(token_named(tok, "Par", "target")) == "Par"  # " Par" is two tokens
    assert name(token_named(tok, " Pa", "target")) == "ĠPa"
    assert name(token_named(tok, "ĠPa", "target")) == "ĠPa"  # the name of a token in the vocabulary
    assert name(token_named(tok, ",", "target")) == ","  # no word, so not read with a space
    assert name(token_named(tok, "!", "target")) == "!"
    with pytest.raises(ValueError, match=r"two tokens: 'ok' is 'ok' \(id \d+\) and ' ok' is 'Ġok' \(id"):
        token_named(tok, "ok", "target")
    with pytest.raises(
        ValueError,
        match=r"contrast must be one .*, got 'Paris': 'Paris' is 'Par' .* \+ 'i' .* \+ 's' .*; ' Paris' is",
    ):
        token_named(tok, "Paris", "contrast")
    with pytest.raises(ValueError, match="target must be one token .*, got '': '' is no token"):
        token_named(tok, "", "target")
    # A WordPiece tokenizer drops spaces, so both readings are the same token.
    assert token_named(tokenizer(), "Film", "target") == token_named(tokenizer(), " film", "target")
    assert name(token_named(tok, "Ġ", "target")) == "Ġ"
    with pytest.raises(ValueError, match=r"target must be one token .*'\[UNK\]'"):
        token_named(tokenizer(), "\u4e2d", "target")


@pytest.mark.parametrize("name", MASKED_MODELS)
def test_a_filled_mask(name):
    model, tok = masked_model(name), tokenizer()
    film, deep = tok.convert_tokens_to_ids(["good", "deep"])
    texts = [MASKED, "deep [MASK]", "a b c [MASK] the film"]
    for options in (dict(target="good", contrast="deep"), dict(target="good"), {}):
        found = explain(model, tok, texts, "gradient-x-input", progress=False, **options)
        for a in found:
            mask = a.tokens.index("[MASK]")
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([a.token_ids])).logits[0, mask].argmax())
            target = film if options else best
            assert_same(a, direct(model, a.token_ids, mask, target, deep if "contrast" in options else None))
            assert a.target == target and a.target_name == (tok.convert_ids_to_tokens(target) or str(target))
    a = explain(model, tok, MASKED, "gradient-rollout", target="good")
    r = pyglobenc.GradientRollout(model)(input_ids=torch.tensor([a.token_ids]), target=film, position=2)
    assert np.array_equal(a.scores, r.scores[0].numpy()) and int(r.position) == 2


def test_windows_of_predicted_tokens():
    words = " the deep good film a b c" * 6
    model = masked_model("bert")
    a = explain(
        model, tokenizer(), "[MASK]" + words, "saliency", target="good", long="windows", max_length=12
    )
    assert a.windows == [(1, 11)]
    # The next token follows the last window.
    b = explain(build("llama"), tokenizer(), words, "saliency", long="windows", max_length=12)
    assert len(b.windows) == 1 and b.windows[0][1] == len(b) - 1


def test_labels_by_name():
    model, tok = classifier(), tokenizer()
    for method in ("gradient-x-input", "transformer-attribution"):
        a = explain(model, tok, TEXT, method, target="GOOD", contrast="BAD")
        b = explain(model, tok, TEXT, method, target=1, contrast=0)
        assert np.array_equal(a.scores, b.scores) and (a.target_name, a.contrast_name) == ("GOOD", "BAD")
    assert_same(
        explain(model, tok, TEXT, "gradient-x-input", target="BAD", contrast="GOOD"),
        direct(model, a.token_ids, None, 0, 1),
    )


@pytest.mark.parametrize(
    "model, text, method, options, error, message",
    [
        (classifier, TEXT, "lrp", dict(target="FINE"), ValueError, "one of 'BAD', 'GOOD', got 'FINE'"),
        (
            classifier,
            TEXT,
            "lrp",
            dict(target=1, contrast=2),
            ValueError,
            r"contrast must be a class in \[0, 2",
        ),
        (classifier, TEXT, "lrp", dict(target=1, contrast="GOOD"), ValueError, "another class than target"),
        (
            classifier,
            TEXT,
            "globenc",
            dict(contrast=1),
            ValueError,
            "contrast belongs to methods that explain",
        ),
        (classifier, TEXT, "globenc", dict(target="film"), TypeError, "globenc explains a position"),
        (classifier, TEXT, "lrp", dict(contrast=True), TypeError, "contrast must be an integer, got True"),
        ("llama", TEXT, "saliency", dict(target=97), ValueError, r"target must be a class in \[0, 97\)"),
        ("llama", TEXT, "saliency", dict(target="filmed"), ValueError, "'film' .* 'e' .* 'd'|##e"),
        ("masked", TEXT, "saliency", {}, ValueError, r"one \[MASK\] is explained, and text has 0"),
        ("masked", "[MASK] [MASK]", "saliency", {}, ValueError, r"one \[MASK\] is explained, and text has 2"),
        ("masked", MASKED, "transformer-attribution", {}, ValueError, "logits for every token or choice"),
    ],
)
def test_refusals(model, text, method, options, error, message):
    made = {"masked": lambda: masked_model("bert"), "llama": lambda: build("llama")}.get(model, model)()
    with pytest.raises(error, match=message):
        explain(made, tokenizer(), text, method, **options)


def test_two_classes_of_one_name():
    model = build("bert-classifier", num_labels=3)
    model.config.id2label = {0: "A", 1: "B", 2: "A"}
    with pytest.raises(ValueError, match="'A' is the label of 2 classes"):
        explain(model, tokenizer(), TEXT, "lrp", target="A")

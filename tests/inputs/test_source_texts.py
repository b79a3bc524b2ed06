"""Encoder-decoders through `explain`, `explain_generation` and the command line."""

import json

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tokenizer
from two_streams import build

from pyglobenc import CrossAttribution, explain, explain_generation
from pyglobenc.cli.main import main

TEXTS = ["the good film.", "a deep, good film"]
SOURCE = dict(method="gradient-rollout", progress=False)


def generator(name: str, **changes):
    changes = dict(vocab_size=len(VOCABULARY)) | changes
    return build(name, **changes)


@pytest.mark.parametrize("name", ["bart", "t5", "marian"])
def test_the_first_token_of_the_target(name):
    model, tok = generator(name), tokenizer()
    for text, one in zip(TEXTS, explain(model, tok, TEXTS, **SOURCE), strict=True):
        ids = torch.tensor([tok(text)["input_ids"]])
        result = CrossAttribution(model)(input_ids=ids)
        np.testing.assert_allclose(one.scores, result.source_scores[0], rtol=1e-9)
        assert one.target == int(result.target) and one.target_name == VOCABULARY[one.target]
        assert one.tokens == tok.convert_ids_to_tokens(ids[0])
    one = explain(model, tok, TEXTS[0], target="good", contrast="film", **SOURCE)
    good, film = (VOCABULARY.index(word) for word in ("good", "film"))
    ids = torch.tensor([tok(TEXTS[0])["input_ids"]])
    result = CrossAttribution(model)(input_ids=ids, target=good, contrast=film)
    np.testing.assert_allclose(one.scores, result.source_scores[0], rtol=1e-9)
    assert (one.target_name, one.contrast_name) == ("good", "film")


def test_classes_and_labels():
    labels = {0: "BAD", 1: "GOOD", 2: "FAIR"}
    model = generator("bart-classifier", id2label=labels, label2id={v: k for k, v in labels.items()})
    model.config.eos_token_id = 3
    one = explain(model, tokenizer(), TEXTS[0], target="FAIR", **SOURCE)
    ids = torch.tensor([tokenizer()(TEXTS[0])["input_ids"]])
    result = CrossAttribution(model)(input_ids=ids, target=2)
    np.testing.assert_allclose(one.scores, result.source_scores[0], rtol=1e-9)
    assert one.target_name == "FAIR"


@pytest.mark.parametrize("name", ["bart", "t5", "m2m_100"])
def test_each_token_of_an_answer(name):
    model, tok = generator(name), tokenizer()
    a = explain_generation(model, tok, TEXTS[0], "gradient-rollout", max_new_tokens=4)
    source = tok(TEXTS[0])["input_ids"]
    start = model.config.decoder_start_token_id
    m = len(source)
    assert a.prompt_length == m + 1 and a.token_ids[: m + 1] == [*source, start]
    answer = a.token_ids[m + 1 :]
    for t in range(len(a)):
        decoder = torch.tensor([[start, *answer[:t]]])
        one = CrossAttribution(model)(input_ids=torch.tensor([source]), decoder_input_ids=decoder)
        # Each token is the most probable one after those before it.
        assert int(one.target) == answer[t]
        np.testing.assert_allclose(a.scores[t, :m], one.source_scores[0], rtol=1e-9)
        np.testing.assert_allclose(a.scores[t, m : m + 1 + t], one.scores[0], rtol=1e-9)
        chance = one.output.logits[0, -1].softmax(-1)[answer[t]]
        assert a.probabilities[t] == pytest.approx(float(chance), rel=1e-9)
    given = explain_generation(model, tok, TEXTS[0], "gradient-rollout", answer=answer)
    np.testing.assert_allclose(given.scores, a.scores, rtol=1e-12)
    spelled = explain_generation(model, tok, TEXTS[0], "gradient-rollout", answer="good film")
    assert spelled.answer.split() == ["good", "film"] and spelled.prompt.startswith(TEXTS[0])


def test_a_forced_first_token_is_the_first_one():
    model = generator("mbart")
    model.generation_config.forced_bos_token_id = 9
    a = explain_generation(model, tokenizer(), TEXTS[0], "gradient-rollout", max_new_tokens=3)
    assert a.token_ids[a.prompt_length] == 9


def test_refusals():
    model, tok = generator("bart"), tokenizer()
    for options, message in (
        (dict(method="saliency"), "belongs to an encoder-decoder"),
        (dict(start_layer=1), "an encoder-decoder has no start_layer"),
        (dict(long="windows"), "splits the source of an encoder-decoder"),
        (dict(target=10**6), "target must be a class in"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, tok, TEXTS[0], **SOURCE | options)
    with pytest.raises(ValueError, match="belongs to an encoder-decoder"):
        explain_generation(model, tok, TEXTS[0], max_new_tokens=2)
    with pytest.raises(TypeError, match="an encoder-decoder takes a text as its prompt"):
        explain_generation(model, tok, [{"role": "user", "content": "a"}], "gradient-rollout")
    classifier = generator("bart-classifier")
    with pytest.raises(ValueError, match="generates no text"):
        explain_generation(classifier, tok, TEXTS[0], "gradient-rollout")


def test_command_line(tmp_path):
    generator("bart").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    to = tmp_path / "out.json"
    call = ["explain", TEXTS[0], "--model", str(tmp_path / "model"), "--method", "gradient-rollout"]
    call += ["--quiet", "--json", str(to)]
    for more in (["--target", "good"], ["--generate", "3"], ["--answer", "good film"]):
        assert main([*call, *more]) == 0
        assert json.loads(to.read_text())

"""Sentence pairs: their encoding with token types, and which text each token comes from."""

import json

import numpy as np
import pytest
import torch
from models import build
from tiny import minilm, tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import pyglobenc
from pyglobenc import GlobEnc, TransformerAttribution, explain
from pyglobenc.cli.main import main
from pyglobenc.explain import explain_each
from pyglobenc.methods.arguments import takes

NAMES = ["input_ids", "token_type_ids", "attention_mask"]
PAIR = ("the good film, deep", "deep film")
LONG = ("the deep good film " * 8, "film a b c d " * 3)


def tok(**changes):
    return tokenizer(model_input_names=NAMES, **changes)


@pytest.mark.parametrize(
    "name", ["bert-classifier", "electra", "albert", "roberta", "deberta-v3", "distilbert", "modernbert"]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pair_is_what_the_model_sees(name, batch_size):
    model, pairs = build(name), [PAIR, ("a", "b"), "the film", ("film a b c", "good film deep, b")]
    found = explain(model, tok(), pairs, batch_size=batch_size, progress=False)
    for a, text in zip(found, pairs, strict=True):
        batch = tok()(*([text] if isinstance(text, str) else text), return_tensors="pt", truncation=False)
        if not takes(model, "token_type_ids"):
            del batch["token_type_ids"]
        r = GlobEnc(model)(**batch)
        torch.testing.assert_close(torch.tensor(a.scores), r.scores[0, 0])
        assert a.token_ids == batch["input_ids"][0].tolist()
        assert a.probability == pytest.approx(float(r.output.logits[0].softmax(0).max()), rel=1e-9)


def test_token_types_count():
    model = build("bert-classifier")
    a, joined = explain(model, tok(), PAIR), explain(model, tok(), " ".join(PAIR))
    b = explain(model, tok(), PAIR, "transformer-attribution")
    r = TransformerAttribution(model)(**tok()(*PAIR, return_tensors="pt", truncation=False))
    torch.testing.assert_close(torch.tensor(b.scores), r.scores[0])
    assert len(a) == len(joined) + 1 and a.probability != joined.probability


def test_parts_and_pictures():
    a = explain(build("bert-classifier"), tok(), PAIR, merge_words=True)
    first = a.tokens.index("[SEP]")
    assert (a.text, a.text_pair) == PAIR
    assert a.parts == [None] + [0] * (first - 1) + [None] + [1] * (len(a) - first - 2) + [None]
    units = a.units()
    assert [unit.text for unit in units] == "[CLS] the good film , deep [SEP] deep film [SEP]".split()
    assert sum(unit.score for unit in units) == pytest.approx(a.scores.sum())
    assert "deep" in a.to_html() and a.to_png()
    assert explain(build("bert-classifier"), tok(), PAIR[0]).parts is None


def test_words_of_texts_without_a_token_between_are_not_merged():
    inner = Tokenizer(
        BPE({piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = PreTrainedTokenizerFast(tokenizer_object=inner)
    a = explain(build("gpt2", vocab_size=300), plain, ("ab", "ac"), merge_words=True)
    assert [(unit.text, unit.before) for unit in a.units()] == [("ab", ""), ("ac", " ")] and a.parts == [
        0,
        0,
        1,
        1,
    ]


def test_slow_tokenizers_know_parts():
    model = build("bert", vocab_size=400)
    a = explain(model, ByT5Tokenizer(), ("abc", "de"))
    assert a.tokens == ["a", "b", "c", "</s>", "d", "e", "</s>"] and a.parts == [0, 0, 0, None, 1, 1, None]
    with pytest.raises(ValueError, match="ByT5Tokenizer isn't a fast tokenizer"):
        explain(model, ByT5Tokenizer(), ("abc" * 10, "de"), long="truncate", max_length=9)


def test_long_pairs():
    model = build("bert-classifier")
    with pytest.raises(
        ValueError,
        match="text has 50 tokens and at most 40 fit; choose long=truncate, which shortens the longer text",
    ):
        explain(model, tok(), LONG)
    with pytest.raises(
        ValueError, match="text 2 is a pair of 50 tokens and at most 40 fit; windows of two texts"
    ):
        explain(model, tok(), ["a", LONG], long="windows")
    with pytest.raises(
        ValueError, match="max_length must leave room for one token of each text and 3 special tokens, got 4"
    ):
        explain(model, tok(), LONG, long="truncate", max_length=4)
    a = explain(model, tok(), LONG, long="truncate", max_length=16)
    batch = tok()(*LONG, truncation="longest_first", max_length=16, return_tensors="pt")
    assert (
        a.token_ids == batch["input_ids"][0].tolist() and len(a) == 16 and a.cut == 34 and a.windows is None
    )
    torch.testing.assert_close(torch.tensor(a.scores), GlobEnc(model)(**batch).scores[0, 0])
    assert "the last tokens of both texts, 34 in all" in a.to_html()
    # The tokenizer's own truncation setting must be the same afterwards.
    assert len(explain(model, tok(), PAIR, long="windows")) == len(explain(model, tok(), PAIR))


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_saved_pairs(tmp_path, suffix):
    pairs = explain(build("bert-classifier"), tok(), [PAIR, "film"], progress=False)
    pairs.save(tmp_path / f"a.{suffix}")
    assert pyglobenc.load(tmp_path / f"a.{suffix}") == pairs


@pytest.mark.parametrize(
    "texts, error, message",
    [
        (
            ("a", "b", "c"),
            TypeError,
            "text is a tuple of 3; a tuple is a pair of texts, and several texts are a list",
        ),
        (("a",), TypeError, "text is a tuple of 1"),
        (("a", None), TypeError, "text must be a string in both its parts, got NoneType"),
        (["a", ("a", "")], ValueError, "a part of text 2 is empty"),
        (("a", "\x00"), ValueError, "the second part of text holds nothing that the tokenizer knows"),
        (("\ud800", "a"), ValueError, "the first part of text isn't valid Unicode"),
        ((["a"], "b"), TypeError, "text must be a string in both its parts, got list"),
    ],
)
def test_pairs_that_are_none(texts, error, message):
    with pytest.raises(error, match=f"explain: {message}"):
        explain(build("bert-classifier"), tok(), texts)


def test_command_line(tmp_path, capsys):
    model, tokenizer_ = minilm()
    expected = list(explain_each(model, tokenizer_, [PAIR, ("a film", "no film")], progress=False))

    def check(*arguments):
        assert main(["explain", "--pair", "--json", "-", "--quiet", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)["attributions"]
        for a, one in zip(found, expected, strict=True):
            assert (a["text"], a["text_pair"], a["parts"]) == (one.text, one.text_pair, one.parts)
            assert np.array_equal(np.array(a["scores"], np.float32), one.scores)

    check(*PAIR, "a film", "no film")
    file = tmp_path / "pairs.tsv"
    file.write_text("\t".join(PAIR) + "\n\na film\tno film\r\n")
    check("--file", str(file))
    file.write_text("a\tb\na\n")
    assert main(["explain", "--pair", "--file", str(file)]) == 1
    assert "pair 2 must be two texts with a tab between, got 1 columns" in capsys.readouterr().err
    for wrong, message in (
        (["a", "b", "c"], "an even number of texts, got 3"),
        (["--whole"], "--pair and --whole exclude each other"),
        (["--image", "x.png"], "--pair"),
    ):
        with pytest.raises(SystemExit):
            main(["explain", "--pair", *wrong, "--model", "m"])
        assert message in capsys.readouterr().err

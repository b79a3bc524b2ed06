"""Words where the tokenizer doesn't split texts, with tokenizers as their classes build them."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from pyglobenc import Attribution
from pyglobenc.inputs.windows import encode

LETTERS = [*"abcdefghijklmnopqrstuvwxyzAB.,!?'-\n", *"中文我爱"]
PAIRS = [
    ("▁", "d"),
    ("▁d", "e"),
    ("▁de", "e"),
    ("▁dee", "p"),
    ("f", "i"),
    ("fi", "l"),
    ("fil", "m"),
    ("▁", "▁"),
]
WHOLE = [a + b for a, b in PAIRS]


def pieces(special):
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {piece: index for index, piece in enumerate([*special, *bytes_, "▁", *LETTERS, *WHOLE])}


def llama():
    return LlamaTokenizer(vocab=pieces(["<unk>", "<s>", "</s>"]), merges=PAIRS)


def gemma():
    return GemmaTokenizer(vocab=pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]), merges=PAIRS)


def fast(inner):
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def legacy_llama():
    """Return a tokenizer like Llama's older tokenizer.json: with a normalizer, without a pre-tokenizer."""
    inner = Tokenizer(BPE(pieces(["<unk>"]), PAIRS, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(inner)


def unigram():
    inner = Tokenizer(
        Unigram([(piece, -1.0 - len(piece)) for piece in pieces(["<unk>"])], 0, byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return fast(inner)


def metaspace():
    inner = Tokenizer(BPE(pieces(["<unk>"]), PAIRS, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    return fast(inner)


def byte_level(regex):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({piece: index for index, piece in enumerate(["<unk>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    inner.decoder = decoders.ByteLevel()
    return fast(inner)


def characters():
    """Return a WordPiece tokenizer whose words are characters, white space included; texts stay whole."""
    vocabulary = ["<unk>", " ", *LETTERS, *(f"##{letter}" for letter in [" ", *LETTERS])]
    inner = Tokenizer(WordPiece({piece: index for index, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    return fast(inner)


UNSPLIT = dict(
    llama=llama,
    gemma=gemma,
    legacy=legacy_llama,
    unigram=unigram,
    bytes=lambda: byte_level(False),
    wordpiece=characters,
)
ALL = UNSPLIT | dict(metaspace=metaspace, gpt2=lambda: byte_level(True))


def words(tokenizer, text):
    """Return the units of an attribution with scores 1, 2, 4...; each sum tells which tokens it contains."""
    one = encode(tokenizer, text, "text", None)
    scores = np.arange(1.0, len(one.tokens) + 1)
    columns = dict(word_ids=one.word_ids, offsets=one.offsets, merge_words=True)
    a = Attribution(
        text, one.tokens, one.inputs["input_ids"], one.special, scores, "globenc", "m", 0, "t", **columns
    )
    units = a.units()
    assert [i for unit in units for i in unit.positions] == list(range(len(a)))
    for unit in units:
        assert unit.score == pytest.approx(float(scores[list(unit.positions)].sum()), rel=1e-12)
    return [unit for unit in units if not unit.special]


@pytest.mark.parametrize("name", UNSPLIT)
@pytest.mark.parametrize(
    "text",
    [
        "a deep film, didn't it.",
        "film",
        "  a  deep\nfilm !  ",
        "deep-film. A",
        "a b c d e f",
        "deep \U0001f389 na\u00efve film",
    ],
)
def test_white_space_makes_words(name, text):
    units = words(ALL[name](), text)
    # A token that isn't in the vocabulary is shown by its name.
    if name != "wordpiece" or all(char in " ".join(LETTERS) for char in text):
        assert [unit.text for unit in units] == text.split()
        assert "".join(unit.before + unit.text for unit in units).strip() == text.strip()


@pytest.mark.parametrize("name", ALL)
def test_scripts_without_spaces_are_split_at_tokens(name):
    assert [unit.text for unit in words(ALL[name](), "我爱 中文, deep")][:4] == ["我", "爱", "中", "文"]


def test_words_of_tokenizers_that_split_are_kept():
    assert [unit.text for unit in words(byte_level(True), "didn't it, A")] == ["didn", "'t", "it", ",", "A"]
    assert [unit.text for unit in words(metaspace(), "didn't it, A")] == ["didn't", "it,", "A"]

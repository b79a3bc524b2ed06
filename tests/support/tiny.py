"""A small tokenizer and models that explain many texts per second, and a real model from a package."""

from copy import deepcopy
from functools import cache

import pytest
from models import build
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from pyglobenc.models.pretrained import load_pretrained, model_folder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [
    *SPECIAL,
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *".,!?$<>&",
    "film",
    "deep",
    "good",
    "##ing",
    "the",
]


def tokenizer(**changes) -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer of letters and a few words, which truncates at 8 tokens by default.

    Some published tokenizers do the same.
    """
    inner = Tokenizer(WordPiece({token: index for index, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.enable_truncation(8)
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=inner, **(names | changes))


def by_bytes(*merges, **names):
    """Return a byte-level BPE tokenizer, as GPT-2's, with some pieces joined: "ab" joins a and b."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    inner = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [tuple(m.split()) for m in merges]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def classifier():
    """Return a BertForSequenceClassification with two labels and 40 positions, in float64.

    Each call returns a copy, so that no test sees what another one did to its model.
    """
    return deepcopy(_classifier())


@cache
def _classifier():
    return build("bert-classifier", id2label={0: "BAD", 1: "GOOD"}, label2id={"BAD": 0, "GOOD": 1})


@cache
def minilm():
    """Return the real model and its tokenizer; skip the test if they aren't installed."""
    try:
        model_folder("minilm")
    except ValueError as error:
        pytest.skip(str(error))
    return load_pretrained("minilm")

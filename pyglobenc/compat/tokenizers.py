"""Tokenizers' `encode_plus`, which the published cells call and transformers 5 has dropped."""

from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase


def add_encode_plus() -> None:
    """Give transformers' tokenizers `encode_plus`, unless they have it; nothing that is there is replaced."""
    if not hasattr(PreTrainedTokenizerBase, "encode_plus"):
        PreTrainedTokenizerBase.encode_plus = _encode_plus


def _encode_plus(
    self: PreTrainedTokenizerBase, text: str, text_pair: str | None = None, **options: Any
) -> BatchEncoding:
    """What calling the tokenizer on a text, or on a pair, gives; transformers 5 would ignore
    pad_to_max_length.
    """
    if options.pop("pad_to_max_length", False):
        options["padding"] = "max_length"
    return self(text, text_pair, **options)

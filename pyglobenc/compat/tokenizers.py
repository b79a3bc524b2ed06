"""The method `encode_plus` of tokenizers, which published notebooks call and transformers 5 has removed."""

from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase


def add_encode_plus() -> None:
    """Add `encode_plus` to the tokenizer class of transformers, unless it has one. Nothing is replaced."""
    if not hasattr(PreTrainedTokenizerBase, "encode_plus"):
        PreTrainedTokenizerBase.encode_plus = _encode_plus


def _encode_plus(
    self: PreTrainedTokenizerBase, text: str, text_pair: str | None = None, **options: Any
) -> BatchEncoding:
    """Call the tokenizer on a text or a pair. pad_to_max_length is translated; transformers 5 ignores it."""
    if options.pop("pad_to_max_length", False):
        options["padding"] = "max_length"
    return self(text, text_pair, **options)

"""Finds the token or the class that a user's target or contrast means: an id, a token's text, or a label."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from pyglobenc.hf.labels import class_name

# A message lists at most this many names.
LISTED = 20


def token_named(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> int:
    """Return the id of the token that a text stands for.

    The text is read as it is, and a word also with a space before it, as it would follow other words. Exactly
    one reading must be a single token. A text that is no token in either reading may be the name of a token
    in the vocabulary, such as "##ing".

    Args:
        tokenizer: the tokenizer.
        text: the text, such as "Paris" or " Paris".
        name: name of the argument for messages.

    Raises:
        ValueError: no reading is a single token, or two readings are different tokens. The message names the
            tokens.
    """
    readings = [text, f" {text}"] if text[:1].isalnum() else [text]
    ids = {one: tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"] for one in readings}
    found = {
        one: row[0] for one, row in ids.items() if len(row) == 1 and not _unknown(tokenizer, row[0], one)
    }
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    if found:
        both = " and ".join(f"{one!r} is {_shown(tokenizer, [ids[one][0]])}" for one in readings)
        raise ValueError(
            f"explain: {name}={text!r} may be two tokens: {both}; give {readings[1]!r}, or one of the ids"
        )
    own = tokenizer.convert_tokens_to_ids(text)
    if isinstance(own, int) and not _unknown(tokenizer, own, text):
        return own
    pieces = "; ".join(f"{one!r} is {_shown(tokenizer, row)}" for one, row in ids.items())
    raise ValueError(f"explain: {name} must be one token of this tokenizer, got {text!r}: {pieces}")


def class_named(config: Any, count: int | None, text: str, name: str) -> int:
    """Return the class whose label is a text.

    Args:
        config: the model's config, whose id2label names the classes.
        count: number of classes; None if it isn't known.
        text: the label.
        name: name of the argument for messages.

    Raises:
        ValueError: no class has this label, or several have it.
    """
    known = getattr(config, "id2label", None) or {}
    names = [class_name(config, index) for index in range(len(known) if count is None else count)]
    if names.count(text) == 1:
        return names.index(text)
    if text in names:
        raise ValueError(
            f"explain: {name}={text!r} is the label of {names.count(text)} classes; give an index"
        )
    listed = ", ".join(map(repr, names[:LISTED])) + ", ..." * (len(names) > LISTED)
    raise ValueError(f"explain: {name} must be a class or its label, one of {listed}, got {text!r}")


def _unknown(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> bool:
    """Return whether a token stands for texts that the vocabulary lacks, and the text isn't its name."""
    return token == tokenizer.unk_token_id and text.strip() != tokenizer.unk_token


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the names and ids of tokens, as a message shows them."""
    names = [
        f"{token!r} (id {i})" for token, i in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)
    ]
    some = " + ".join(names[:LISTED]) + " + ..." * (len(names) > LISTED)
    return some or "no token"

"""Decides which tokens form a word: as the tokenizer splits a text, or at white space if it doesn't split."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

# The Unicode names of characters begin with these words in scripts that put no space between words.
UNSPACED = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "BOPOMOFO",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
)


def word_numbers(
    words: Sequence[int | None],
    offsets: Sequence[tuple[int, int]],
    parts: Sequence[int | None],
    texts: Sequence[str],
) -> list[int | None]:
    """Return the number of the word that each token belongs to, ascending from 0; None for special tokens.

    The tokenizer's words are kept where they hold no space. Some tokenizers, such as those of Llama and
    Gemma, take a whole text for one word. Such a word is split at white space, so punctuation stays with the
    word that it is written next to. In scripts without spaces each token is a word, since nothing else says
    where a word ends; tokens that share a character stay together.

    Args:
        words: n numbers of the tokenizer's words, None for special tokens.
        offsets: n pairs (start, stop) of characters of the token's own text.
        parts: n numbers of the token's own text among texts, None for special tokens.
        texts: one text, or the two of a pair.
    """
    out: list[int | None] = []
    last, end, number = None, 0, -1
    begun, inner, filled = (
        0,
        False,
        False,
    )  # of the current word: its first token, whether it was split off, whether it has a visible character
    for i, (word, (start, stop), part) in enumerate(zip(words, offsets, parts, strict=True)):
        text, own = texts[part or 0], (word, part)
        splits = word is not None and own == last and filled and _apart(text, end, start, stop)
        if own != last or splits:
            number -= _join_space(out, begun, inner and not filled)
            begun, inner, filled = i, splits, False
            number += word is not None
        filled = filled or bool(text[start:stop].strip())
        out.append(None if word is None else number)
        last, end = own, stop
    _join_space(out, begun, inner and not filled)
    return out


def _join_space(out: list[int | None], begun: int, alone: bool) -> bool:
    """Give a word of white space alone to the word before it; return whether that happened."""
    if alone:
        out[begun:] = [number - 1 for number in out[begun:]]
    return alone


def _apart(text: str, end: int, start: int, stop: int) -> bool:
    """Return whether a token begins a new word inside one word of the tokenizer.

    The token spans the characters from `start` to `stop`, and the token before it ended at `end`.
    """
    if start < end or start == stop:
        # The two tokens share a character, or this one has no character.
        return False
    around = text[max(end - 1, 0) : start + 1]
    return any(char.isspace() for char in around) or unspaced(around[0]) or unspaced(around[-1])


@lru_cache(maxsize=4096)
def unspaced(char: str) -> bool:
    """Return whether a character belongs to a script that puts no space between words."""
    return unicodedata.name(char, "").startswith(UNSPACED)

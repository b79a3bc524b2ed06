"""Texts as a model takes them: tokens, what is left out, overlapping windows, and the windows' scores
joined.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyglobenc.inputs.words import word_numbers

LONG = ("error", "truncate", "windows")
# one text, or two that the model sees together
Text = str | tuple[str, str]
# a tokenizer takes some 180 bytes and a microsecond for each character of a text
MAX_CHARACTERS = 1 << 21
# of a token, on average, in a text that is worth tokenizing to see whether it fits; WordPiece gives up on
# words of 100
TOKEN_CHARACTERS = 128


@dataclass
class Encoded:
    """A text's n tokens, and the windows of them that the model sees one at a time; fields as those of
    `Attribution`.
    """

    text: str
    inputs: dict[str, list[int]]  # the model's, n entries each
    tokens: list[str]
    special: list[bool]
    word_ids: list[int | None] | None
    offsets: list[tuple[int, int]] | None
    cut: int
    windows: list[list[int]]  # positions of tokens; all n of them where the text fits
    text_pair: str | None = None
    parts: list[int | None] | None = None

    def spans(self, windows: list[list[int]]) -> list[tuple[int, int]] | None:
        """(start, stop) of the text tokens in each of some windows; None where one window holds the text."""
        if len(self.windows) == 1:
            return None
        inside = [[i for i in window if not self.special[i]] for window in windows]
        return [(positions[0], positions[-1] + 1) for positions in inside]


def most_characters(limit: int | None, long: str) -> int:
    """Characters of a text, at most, for it to be tokenized at all; limit and long as for `encode`."""
    fit = MAX_CHARACTERS if limit is None else TOKEN_CHARACTERS * limit
    return fit if long == "error" else max(fit, MAX_CHARACTERS)


def check_characters(text: str, name: str, limit: int | None, long: str) -> None:
    """Raise ValueError, naming the text, if it is so long that tokenizing it would take too much memory;
    arguments as for `encode`.
    """
    most = most_characters(limit, long)
    if len(text) > most:
        other = (
            "; choose long=truncate or long=windows"
            if long == "error" and len(text) <= most_characters(limit, "windows")
            else ""
        )
        raise ValueError(
            f"explain: {name} has {len(text)} characters and at most {most} are tokenized{other}"
        )


def encode(
    tokenizer: Any, text: Text, name: str, limit: int | None, long: str = "error", stride: int | None = None
) -> Encoded:
    """Tokenize a text, or a pair; what doesn't fit is refused, cut with its length kept, or split, as long
    says; never cut silently.

    Args:
        tokenizer: of transformers.
        text: one text, or a pair, which the tokenizer joins in its own way.
        name: the text's, in errors: "text" or "text 3".
        limit: tokens that the model takes, special tokens included; None for no limit.
        long: "error", "truncate" or "windows"; of a pair the longer text is truncated first, and windows are
            refused.
        stride: tokens from the start of one window to the start of the next; None for half a window.

    Raises:
        ValueError: no token, or more than limit with long="error"; so many characters that the text isn't
            tokenized; stride that leaves gaps, limit without room for text.
    """
    texts = (text,) if isinstance(text, str) else text
    for one, part in zip(texts, _part_names(name, len(texts)), strict=True):
        check_characters(one, part, limit, long)
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"explain: {part} isn't valid Unicode (a lone surrogate at character {error.start})"
            ) from error
    found, special, parts = _tokenize(tokenizer, texts)
    for number, part in enumerate(_part_names(name, len(texts))):
        if number not in parts:
            raise ValueError(
                f"explain: {part} holds nothing that the tokenizer knows: {texts[number][:40]!r}"
            )
    if len(texts) == 1:
        head = special.index(False)
        body = len(special) - special[::-1].index(False) - head
        positions, windows, cut = _fit(len(special), head, body, name, limit, long, stride)
    else:
        n = len(special)
        if limit is not None and n > limit:
            _check_long_pair(n, special, name, limit, long)
            found, special, parts = _tokenize(tokenizer, texts, truncation="longest_first", max_length=limit)
        cut, positions = n - len(special), list(range(len(special)))
        windows = [positions]
    inputs = {key: found[key] for key in tokenizer.model_input_names if key in found}
    words = offsets = None
    if tokenizer.is_fast:
        offsets = found["offset_mapping"]
        words = word_numbers(found.word_ids(), offsets, parts, texts)
    pair = dict(text_pair=texts[1], parts=parts) if len(texts) == 2 else {}
    keep = [
        None if column is None else [column[i] for i in positions] for column in (special, words, offsets)
    ]
    inputs = {key: [column[i] for i in positions] for key, column in inputs.items()}
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"])
    return Encoded(texts[0], inputs, tokens, *keep, cut, windows, **pair)


def _part_names(name: str, count: int) -> list[str]:
    """What errors call the texts of a pair, or a single text."""
    return [name] if count == 1 else [f"the first part of {name}", f"the second part of {name}"]


def _tokenize(
    tokenizer: Any, texts: Sequence[str], **options: Any
) -> tuple[Any, list[bool], list[int | None]]:
    """What a tokenizer returns for a text or a pair; n times whether the token is special, and the number of
    its text or None.
    """
    options = dict(truncation=False) | options
    options |= dict(
        padding=False,
        verbose=False,
        return_special_tokens_mask=True,
        return_offsets_mapping=tokenizer.is_fast,
    )
    found = tokenizer(*texts, **options)
    special = [bool(flag) for flag in found["special_tokens_mask"]]
    if len(texts) == 1:
        return found, special, [None if flag else 0 for flag in special]
    if tokenizer.is_fast:
        return found, special, found.sequence_ids()
    if "max_length" in options:
        raise ValueError(
            f"explain: {type(tokenizer).__name__} isn't a fast tokenizer, which would tell where it cut "
            f"each text of a pair"
        )
    # a slow tokenizer doesn't say which token is of which text
    counts = [len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    order = iter([0] * counts[0] + [1] * counts[1])
    if special.count(False) != sum(counts):
        raise ValueError(
            f"explain: {type(tokenizer).__name__} joins the texts of a pair to other tokens than each text "
            f"has alone"
        )
    return found, special, [None if flag else next(order) for flag in special]


def _check_long_pair(n: int, special: list[bool], name: str, limit: int, long: str) -> None:
    """Raise ValueError unless a pair of n tokens may be truncated to limit of them."""
    added, way = special.count(True), "choose long=truncate, which shortens the longer text first"
    if long == "windows":
        found = f"{name} is a pair of {n} tokens and at most {limit} fit"
        raise ValueError(
            f"explain: {found}; windows of two texts that belong together have no meaning; {way}"
        )
    if long == "error":
        raise ValueError(f"explain: {name} has {n} tokens and at most {limit} fit; {way}")
    if limit < added + 2:
        raise ValueError(
            f"explain: max_length must leave room for a token of each text beside {added} special ones, got "
            f"{limit}"
        )


def _fit(n: int, head: int, body: int, name: str, limit: int | None, long: str, stride: int | None):
    """Positions of n tokens that are kept, windows of them, and how many are cut; head special tokens, then
    body text tokens.
    """
    everything = list(range(n))
    extra = n - body
    if limit is not None and limit <= extra:
        raise ValueError(
            f"explain: max_length must be above the {extra} special tokens that the tokenizer adds, got "
            f"{limit}"
        )
    size = None if limit is None else limit - extra
    if stride is not None and (stride < 1 or (size is not None and stride > size)):
        raise ValueError(
            f"explain: stride must lie in [1, {size}], the text tokens of a window, got {stride}"
        )
    if size is None or body <= size:
        return everything, [everything], 0
    if long == "error":
        raise ValueError(
            f"explain: {name} has {n} tokens and at most {limit} fit; choose long=truncate to leave out the "
            f"last {body - size}, "
            f"or long=windows to join overlapping windows"
        )
    if long == "truncate":
        kept = everything[: head + size] + everything[head + body :]
        return kept, [list(range(limit))], body - size
    # the last window ends with the text, so that all windows are equally long and their scores compare
    starts = [*range(0, body - size, stride or max(1, size // 2)), body - size]
    windows = [
        everything[:head] + everything[head + a : head + a + size] + everything[head + body :] for a in starts
    ]
    return everything, windows, 0


def join(
    n: int, windows: Sequence[Sequence[int]], rows: Sequence[np.ndarray], log_scales: Sequence[float]
) -> tuple[np.ndarray, float]:
    """One row of scores from those of overlapping windows.

    Each window's row is divided by the sum of its absolute values, so that every window has the same say
    whatever the scale of its rollout; a token's score is the mean over the windows that hold it. Windows are
    equally long, so a token's share of one compares with its share of another. A single window is passed on
    as it is.

    Args:
        n: tokens of the text.
        windows: positions of each window's tokens.
        rows: scores of each, as long as its window, float32 or float64.
        log_scales: of each; what a window's own scores are multiplied by doesn't matter to more than one.

    Returns:
        scores (n,), largest absolute value 1, 0 for tokens in no window, the dtype of rows; and log_scale,
        with which scores * exp(log_scale) is the mean share.
    """
    if len(windows) == 1 and len(windows[0]) == n:
        return rows[0], log_scales[0]
    total, count = np.zeros(n), np.zeros(n)
    for window, row in zip(windows, rows, strict=True):
        mass = np.abs(row).sum(dtype=np.float64)
        total[list(window)] += row / mass if mass > 0 else 0
        count[list(window)] += 1
    mean = total / np.maximum(count, 1)
    top = np.abs(mean).max()
    if top == 0:
        return mean.astype(rows[0].dtype), 0.0
    return (mean / top).astype(rows[0].dtype), float(np.log(top))

"""Tokenizes texts, splits long ones into overlapping windows, and joins the scores of the windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyglobenc.inputs.words import word_numbers

LONG = ("error", "truncate", "windows")
# One text, or a pair of texts that the model reads together.
Text = str | tuple[str, str]
# A tokenizer needs about 180 bytes and a microsecond for each character of a text.
MAX_CHARACTERS = 1 << 21
# A text with more characters per token than this, on average, is refused before it is tokenized. WordPiece
# gives up on words of 100 characters.
TOKEN_CHARACTERS = 128


@dataclass
class Encoded:
    """The n tokens of a text, and the windows that the model reads; other fields as in `Attribution`."""

    text: str
    inputs: dict[str, list[int]]  # inputs of the model by name, n entries each
    tokens: list[str]
    special: list[bool]
    word_ids: list[int | None] | None
    offsets: list[tuple[int, int]] | None
    cut: int
    windows: list[list[int]]  # positions of tokens; one window of all n tokens if the text fits
    text_pair: str | None = None
    parts: list[int | None] | None = None

    def spans(self, windows: list[list[int]]) -> list[tuple[int, int]] | None:
        """Return (start, stop) of the text tokens in each window; None if one window holds the whole text."""
        if len(self.windows) == 1:
            return None
        inside = [[i for i in window if not self.special[i]] for window in windows]
        return [(positions[0], positions[-1] + 1) for positions in inside]


def most_characters(limit: int | None, long: str) -> int:
    """Return the largest number of characters of a text that is tokenized; limit and long as for `encode`."""
    fit = MAX_CHARACTERS if limit is None else TOKEN_CHARACTERS * limit
    return fit if long == "error" else max(fit, MAX_CHARACTERS)


def check_characters(text: str, name: str, limit: int | None, long: str) -> None:
    """Raise ValueError if tokenizing a text would need too much memory; arguments as for `encode`."""
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
    tokenizer: Any,
    text: Text,
    name: str,
    limit: int | None,
    long: str = "error",
    stride: int | None = None,
    add_special_tokens: bool = True,
) -> Encoded:
    """Tokenize a text or a pair, and split it into windows if asked to.

    A text that is too long is never cut silently: it is refused, cut with the number of cut tokens kept, or
    split.

    Args:
        tokenizer: a tokenizer of transformers.
        text: one text; or a pair, which the tokenizer joins.
        name: name of the text for error messages, such as "text" or "text 3".
        limit: largest number of tokens of the model, special tokens included; None for no limit.
        long: "error", "truncate" or "windows". Of a pair, "truncate" shortens the longer text first, and
            "windows" is refused.
        stride: number of tokens from the start of one window to the start of the next; None for half a
            window.
        add_special_tokens: False for a text that holds its special tokens already, as chat templates write
            it.

    Returns:
        Encoded, with n tokens and windows of at most `limit` positions.

    Raises:
        ValueError: the text has no token, too many tokens with long="error", or too many characters; the
            stride leaves gaps; or the limit leaves no room for text.
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
    found, special, parts = _tokenize(tokenizer, texts, add_special_tokens=add_special_tokens)
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
    """Return the names of the texts of a pair, or of a single text, for error messages."""
    return [name] if count == 1 else [f"the first part of {name}", f"the second part of {name}"]


def _tokenize(
    tokenizer: Any, texts: Sequence[str], **options: Any
) -> tuple[Any, list[bool], list[int | None]]:
    """Return the tokenizer's result for a text or a pair, and two lists of n entries.

    The first list tells whether each token is special. The second one holds the number of the token's text,
    or None for a special token.
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
    # A slow tokenizer doesn't tell which text a token comes from.
    counts = [len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    order = iter([0] * counts[0] + [1] * counts[1])
    if special.count(False) != sum(counts):
        raise ValueError(
            f"explain: {type(tokenizer).__name__} tokenizes the texts of a pair differently from each text "
            f"alone"
        )
    return found, special, [None if flag else next(order) for flag in special]


def _check_long_pair(n: int, special: list[bool], name: str, limit: int, long: str) -> None:
    """Raise ValueError unless a pair of n tokens may be truncated to `limit` tokens."""
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
            f"explain: max_length must leave room for one token of each text and {added} special tokens, got "
            f"{limit}"
        )


def _fit(n: int, head: int, body: int, name: str, limit: int | None, long: str, stride: int | None):
    """Return the kept positions of n tokens, the windows of them, and the number of tokens that are cut.

    The tokens are `head` special tokens, then `body` text tokens, then more special tokens.
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
    # The last window ends where the text ends, so that all windows have the same length and their scores are
    # comparable.
    starts = [*range(0, body - size, stride or max(1, size // 2)), body - size]
    windows = [
        everything[:head] + everything[head + a : head + a + size] + everything[head + body :] for a in starts
    ]
    return everything, windows, 0


def join(
    n: int, windows: Sequence[Sequence[int]], rows: Sequence[np.ndarray], log_scales: Sequence[float]
) -> tuple[np.ndarray, float]:
    """Join the scores of overlapping windows into one row of scores.

    Each window's scores are divided by the sum of their absolute values, so that every window has the same
    weight whatever the scale of its rollout. A token's score is the mean over the windows that contain it.
    All windows have the same length, so a token's share of one window is comparable with its share of
    another. A single window is returned unchanged.

    Args:
        n: number of tokens of the text.
        windows: positions of the tokens in each window.
        rows: scores of each window, as long as the window, float32 or float64.
        log_scales: logarithm of each window's scale. It is used only if there is a single window.

    Returns:
        scores (n,) in the dtype of rows, with largest absolute value 1, and 0 for tokens in no window; and
        log_scale, for which scores * exp(log_scale) is the mean share.
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

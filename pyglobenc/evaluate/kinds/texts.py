"""Makes the examples of texts: their tokens, the units that are removed, and the explained class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyglobenc.evaluate.attributions import Attributor
from pyglobenc.evaluate.choices import LABEL
from pyglobenc.evaluate.examples import KEPT, Example, Settings
from pyglobenc.evaluate.forwards import Forwards
from pyglobenc.explain import check_texts
from pyglobenc.hf.limits import vocabulary
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.inputs.batches import longest
from pyglobenc.inputs.windows import Encoded, Text, encode


def encode_texts(
    attributor: Attributor, texts: Sequence[Text], max_length: int | None, long: str
) -> list[Encoded]:
    """Tokenize texts.

    Raises:
        TypeError, ValueError: a text is empty, too long or no string, or the tokenizer isn't the model's.
    """
    if long not in ("error", "truncate"):
        raise ValueError(f"evaluate: long must be error or truncate, got {long!r}")
    if isinstance(texts, str):
        raise TypeError("evaluate: texts must be a list of strings, got str")
    model, tokenizer = stock_model(attributor.model), attributor.tokenizer
    try:
        names, limit = check_texts(texts), longest(model, tokenizer, max_length)
        encoded = [
            encode(tokenizer, text, name, limit, long) for text, name in zip(texts, names, strict=True)
        ]
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(str(error).replace("explain: ", "evaluate: ", 1)) from error
    known, largest = vocabulary(model), max(max(text.inputs["input_ids"]) for text in encoded)
    if largest >= known:
        raise ValueError(
            f"evaluate: the tokenizer isn't the model's: token id {largest}, and the model has {known} "
            f"embeddings"
        )
    return encoded


def text_examples(
    attributor: Attributor,
    forwards: Forwards,
    encoded: Sequence[Encoded],
    labels: Sequence[int | str] | None,
    target: int | str | None,
    settings: Settings,
) -> tuple[list[Example], str]:
    """Return the examples of texts, and a note on the token that the head reads.

    Raises:
        TypeError, ValueError: the number of labels is wrong, a label or the target is no class, or a label is
            missing.
    """
    inputs = [text.inputs for text in encoded]
    chances, truth, targets = explained_classes(forwards, inputs, labels, target, "texts")
    explained, note = attributor.explained(encoded)
    examples = []
    for index, text in enumerate(encoded):
        units = text_units(text, explained[index], settings.words)
        whole = None if chances is None else chances[index]
        examples.append(Example(index, text.inputs, units, targets[index], whole, truth[index], text))
    return examples, note


def explained_classes(
    forwards: Forwards,
    inputs: Sequence[Any],
    labels: Sequence[int | str] | None,
    target: int | str | None,
    what: str,
) -> tuple[np.ndarray | None, list[int | None], list[int | None]]:
    """Check labels and the target.

    Args:
        forwards: the plain model.
        inputs: N whole inputs that `Forwards.whole` takes.
        labels, target: as for `evaluate`.
        what: the name of the inputs for error messages.

    Returns:
        The probabilities (N, classes), or None; N labels and N explained classes, each an index or None.

    Raises:
        TypeError, ValueError: the number of labels is wrong, a label or the target is no class, or a label is
            missing.
    """
    if labels is not None and len(labels) != len(inputs):
        raise ValueError(
            f"evaluate: labels must hold one label for each of {len(inputs)} {what}, got {len(labels)}"
        )
    chances = forwards.whole(inputs)
    if chances is None and (target is not None or labels is not None):
        raise ValueError(f"evaluate: target and labels need classes; {forwards.why_no_classes}")
    if target == LABEL and labels is None:
        raise ValueError("evaluate: target='label' needs labels (labels=), and none were given")
    none: list[int | None] = [None] * len(inputs)
    if chances is None:
        return None, none, none
    config, classes = forwards.model.config, chances.shape[1]
    truth = none if labels is None else [class_index(config, label, classes) for label in labels]
    if target == LABEL:
        return chances, truth, truth
    if target is not None:
        return chances, truth, [class_index(config, target, classes)] * len(inputs)
    return chances, truth, chances.argmax(1).tolist()


def class_index(config: Any, label: int | str, classes: int) -> int:
    """Return the index of a class, given as an index or as a name of the config's label2id.

    Raises:
        TypeError, ValueError: there is no such class.
    """
    known = getattr(config, "label2id", None) or {}
    if isinstance(label, str):
        index = known.get(label, int(label) if label.isdecimal() else None)
        if index is None:
            raise ValueError(f"evaluate: a class must be of {', '.join(map(str, known))}, got {label!r}")
    elif isinstance(label, int | np.integer) and not isinstance(label, bool):
        index = int(label)
    else:
        raise TypeError(f"evaluate: a class must be an index or a name, got {label!r}")
    if not 0 <= index < classes:
        raise ValueError(f"evaluate: a class must lie in [0, {classes}), got {label!r}")
    return index


def text_units(encoded: Encoded, explained: int | None, words: bool) -> np.ndarray:
    """Return the unit of each token of a text, (n,) int64, for `Example.units`.

    Args:
        encoded: the text's tokens.
        explained: position of the token that the head reads; None for a mean over tokens.
        words: units are words.

    Raises:
        ValueError: words are asked for, and the tokenizer doesn't say which tokens form one.
    """
    if words and encoded.word_ids is None:
        raise ValueError("evaluate: words=True needs a fast tokenizer, which knows its words")
    groups = encoded.word_ids if words else range(len(encoded.tokens))
    left_out = None if explained is None else groups[explained]
    numbers: dict[int, int] = {}
    units = np.full(len(encoded.tokens), KEPT)
    for position, group in enumerate(groups):
        if group is not None and not encoded.special[position] and group != left_out:
            units[position] = numbers.setdefault(group, len(numbers))
    return units

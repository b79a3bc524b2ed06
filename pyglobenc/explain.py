"""`explain`: texts in, attributions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pyglobenc.common.arguments import known_arguments, refuse_unknown
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.windows import Encoded, Text, encode
from pyglobenc.results import Attribution, Attributions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyglobenc.inputs.batches import Runner


NAMES = {field.name for field in fields(Options)}


@known_arguments
def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text | Sequence[Text],
    method: str = "globenc",
    *,
    target: int | str | None = None,
    merge_words: bool = False,
    long: str = "error",
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Attribution | Attributions:
    """Which tokens of a text a model's result rests on.

    Args:
        model: a transformers model of a known architecture, in evaluation mode; wrapped or not, or in a
            module with a head of its own around it, as `GlobEnc` takes it.
        tokenizer: the model's.
        text: one text, or a list of several. A tuple of two texts is a sentence pair, encoded in the
            tokenizer's own way with its token types; a list may hold pairs too.
        method: a name in `pyglobenc.methods.registry.METHODS`.
        target: what is explained: of most methods a token's position, special tokens counted, negative from
            the end, "mean" for the mean of all tokens' rows, None as for `GlobEnc`; of methods that explain a
            class its index, None for the class predicted.
        merge_words: pictures show words as the tokenizer splits them, else as white space does, the scores of
            their pieces summed. The result keeps the tokens.
        long: what is done with a text of more than max_length tokens: "error" raises, "truncate" leaves out
            its end, "windows" joins the scores of overlapping windows as `pyglobenc.inputs.windows.join`
            says, of those windows that hold the target. Of a pair the longer text is truncated first, and
            windows are refused.
        max_length: tokens, special tokens included; None for all that model and tokenizer take.
        stride: of windows: tokens from the start of one to the start of the next; None for half a window.
        batch_size: texts or windows that the model sees at once, at most: fewer where an estimate says that
            memory is short, and half as many each time it runs out all the same.
        backend, dtype: as for `GlobEnc`.
        progress: show a bar on stderr when there is more than one text.

    Returns:
        Attribution, scores (n,); for several texts Attributions, a list in their order.

    Raises:
        TypeError, ValueError: text that is empty, not a string, or too long; unknown method, backend or
            architecture; target out of range; anything else that the method refuses. All texts are checked
            before the first is computed.
    """
    single = isinstance(text, str | tuple)
    done = explain_each(
        model,
        tokenizer,
        [text] if single else text,
        method=method,
        target=target,
        merge_words=merge_words,
        long=long,
        max_length=max_length,
        stride=stride,
        batch_size=batch_size,
        backend=backend,
        dtype=dtype,
        progress=progress,
    )
    return next(done) if single else Attributions(done)


def explain_each(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], **options: Any
) -> Iterator[Attribution]:
    """`explain` for several texts or pairs, with its options, one attribution at a time: when it is stopped,
    the caller has those before.

    Returns:
        Iterator of Attribution, scores (n,), in the order of texts.

    Raises:
        TypeError, ValueError: as `explain`, at once.
    """
    # transformers takes seconds to import
    from pyglobenc.inputs.batches import Runner, check_target, longest

    refuse_unknown("explain", options.keys() - NAMES, NAMES)
    chosen = Options(**options)
    names = _check_texts(texts)
    runner = Runner(model, tokenizer, chosen)
    limit = longest(runner.model, tokenizer, chosen.max_length)
    encoded = [
        encode(tokenizer, text, name, limit, chosen.long, chosen.stride)
        for text, name in zip(texts, names, strict=True)
    ]
    for one, name in zip(encoded, names, strict=True):
        check_target(runner, one, name)
    return _attributions(runner, encoded, chosen)


def _attributions(runner: Runner, encoded: list[Encoded], options: Options) -> Iterator[Attribution]:
    common = dict(method=options.method, model=runner.model_name, merge_words=options.merge_words)
    for one, scored in zip(
        encoded, _with_bar(runner.run(encoded), len(encoded), options.progress), strict=True
    ):
        columns = dict(
            token_ids=one.inputs["input_ids"], special=one.special, word_ids=one.word_ids, offsets=one.offsets
        )
        columns |= dict(text_pair=one.text_pair, parts=one.parts)
        settings = options.record() | runner.versions
        yield Attribution(one.text, one.tokens, cut=one.cut, settings=settings, **columns, **common, **scored)


def _check_texts(texts: Sequence[Text]) -> list[str]:
    """What errors call each text."""
    if not isinstance(texts, Sequence) or isinstance(texts, (str, bytes)):
        raise TypeError(f"explain: text must be a string or a list of strings, got {type(texts).__name__}")
    if not texts:
        raise ValueError("explain: there is no text, got an empty list")
    names = ["text"] if len(texts) == 1 else [f"text {number}" for number in range(1, len(texts) + 1)]
    for text, name in zip(texts, names, strict=True):
        if isinstance(text, tuple) and len(text) != 2:
            raise TypeError(
                f"explain: {name} is a tuple of {len(text)}; a tuple is a pair of texts, and several texts "
                f"are a list"
            )
        for one in text if isinstance(text, tuple) else (text,):
            if not isinstance(one, str):
                raise TypeError(
                    f"explain: {name} must be a string{' in both its parts' * (one is not text)}, got "
                    f"{type(one).__name__}"
                )
            if not one.strip():
                where = f"a part of {name}" if one is not text else name
                raise ValueError(
                    f"explain: {where} is empty"
                    if not one
                    else f"explain: {where} is nothing but white space"
                )
    return names


def _with_bar(items: Iterator[Any], total: int, show: bool) -> Iterator[Any]:
    if total == 1 or not show:
        return items
    from tqdm import tqdm

    return iter(tqdm(items, total=total, desc="explain", unit="text"))

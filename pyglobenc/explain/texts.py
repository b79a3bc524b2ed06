"""The function `explain` takes texts and returns their attributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pyglobenc.common.arguments import known_arguments, refuse_unknown
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.pipelines import takes_pipelines
from pyglobenc.inputs.windows import Encoded, Text, encode
from pyglobenc.results import Attribution, Attributions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyglobenc.inputs.batches import Runner


NAMES = {field.name for field in fields(Options)}


@takes_pipelines
@known_arguments
def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text | Sequence[Text],
    method: str = "globenc",
    *,
    target: int | str | None = None,
    contrast: int | str | None = None,
    start_layer: int = 0,
    target_span: tuple[int, int] | None = None,
    reasoning_span: tuple[int, int] | None = None,
    hops: int | None = None,
    merge_words: bool = False,
    long: str = "error",
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Attribution | Attributions:
    """Compute how much each token of a text contributes to a model's result.

    Args:
        model: a transformers model of a known architecture, in evaluation mode. It may be wrapped, or be part
            of a module with its own head, as for `GlobEnc`. A pipeline of transformers stands for model and
            tokenizer: `explain(pipeline, text)`.
        tokenizer: the model's tokenizer.
        text: one text, or a list of texts. A tuple of two texts is a sentence pair: the tokenizer joins the
            two texts and sets their token types. A list may contain pairs.
        method: a name in `pyglobenc.methods.registry.METHODS`.
        target: what is explained. Most methods explain a token: its position, which counts special tokens and
            may be negative to count from the end; "mean" for the mean of all tokens' rows; or None for the
            default of `GlobEnc`. Other methods explain a class: its index, its label in the config's
            id2label, or None for the predicted class. Of a language model, gradient methods explain the next
            token: its id, its text, or None for the predicted one. Of a masked language model they explain
            the token at the text's only mask token. A text such as "Paris" is read as it is and with a space
            before it; exactly one of the two readings must be a single token.
        contrast: another class or token, given in the same ways. Its logit is subtracted from the target's,
            and the difference is explained. Methods that explain a position have none.
        start_layer: the lowest layer of the rollout, for methods that have it, as for
            `TransformerAttribution`. Other methods refuse a number above 0.
        target_span, reasoning_span, hops: as `InformationFlow` takes them, for that method alone. A span is a
            pair (start, stop) of positions in every text, special tokens counted. target_span takes the place
            of target. The other methods refuse all three.
        merge_words: pictures show words instead of tokens, with the sum of their tokens' scores. Words are
            the tokenizer's, or are split at white space if the tokenizer doesn't split texts. The result
            keeps the tokens.
        long: what happens to a text of more than max_length tokens. "error" raises ValueError. "truncate"
            removes the end of the text; of a pair it shortens the longer text first. "windows" splits the
            text into overlapping windows and joins the scores of the windows that contain the target, see
            `pyglobenc.inputs.windows.join`; pairs are refused.
        max_length: largest number of tokens, special tokens included. None: the limit of model and tokenizer.
        stride: number of tokens from the start of one window to the start of the next. None: half a window.
        batch_size: largest number of texts or windows in one batch. A batch is smaller if the estimate of its
            memory exceeds what is free, and is halved each time memory runs out.
        backend, dtype: as for `GlobEnc`.
        progress: show a progress bar on stderr if there are several texts.

    Returns:
        Attribution with scores (n,). For a list of texts: Attributions, a list in the same order.

    Raises:
        TypeError, ValueError: a text is empty, not a string or too long; the method, backend or architecture
            is unknown; the target is out of range; or the method refuses the input for another reason. All
            texts are checked before the first one is computed.
    """
    single = isinstance(text, str | tuple)
    done = explain_each(
        model,
        tokenizer,
        [text] if single else text,
        method=method,
        target=target,
        contrast=contrast,
        start_layer=start_layer,
        target_span=target_span,
        reasoning_span=reasoning_span,
        hops=hops,
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
    """Compute attributions of several texts or pairs one at a time.

    A caller who stops the iteration keeps the attributions that were already returned.

    Args:
        model, tokenizer: as for `explain`.
        texts: the texts or pairs.
        options: the keyword arguments of `explain`.

    Returns:
        Iterator of Attribution with scores (n,), in the order of texts.

    Raises:
        TypeError, ValueError: as `explain`, before the first attribution is computed.
    """
    # Importing transformers takes seconds.
    from pyglobenc.inputs.batches import Runner, check_target, longest

    refuse_unknown("explain", options.keys() - NAMES, NAMES)
    chosen = Options(**options)
    names = check_texts(texts)
    runner = Runner(model, tokenizer, chosen)
    limit = longest(runner.model, tokenizer, chosen.max_length)
    encoded = [
        encode(tokenizer, text, name, limit, chosen.long, chosen.stride)
        for text, name in zip(texts, names, strict=True)
    ]
    for one, name in zip(encoded, names, strict=True):
        check_target(runner, one, name)
    return _attributions(runner, encoded, names, chosen)


def _attributions(
    runner: Runner, encoded: list[Encoded], names: list[str], options: Options
) -> Iterator[Attribution]:
    common = dict(method=options.method, model=runner.model_name, merge_words=options.merge_words)
    results = runner.run(encoded, names=names)
    for one, scored in zip(encoded, _with_bar(results, len(encoded), options.progress), strict=True):
        columns = dict(
            token_ids=one.inputs["input_ids"], special=one.special, word_ids=one.word_ids, offsets=one.offsets
        )
        columns |= dict(text_pair=one.text_pair, parts=one.parts)
        settings = options.record() | runner.versions
        yield Attribution(one.text, one.tokens, cut=one.cut, settings=settings, **columns, **common, **scored)


def check_texts(texts: Sequence[Text]) -> list[str]:
    """Check the texts, and return the name of each one for error messages."""
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

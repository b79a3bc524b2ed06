"""The function `explain_generation` explains the tokens that a language model generates after a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyglobenc.common.arguments import known_arguments
from pyglobenc.hf.limits import vocabulary
from pyglobenc.hf.registry import is_decoder
from pyglobenc.hf.streams.registry import start_token
from pyglobenc.inputs.answers import followed_by, generate, generate_target
from pyglobenc.inputs.batches import LANGUAGE_HEADS, Runner, longest
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.pipelines import takes_pipelines
from pyglobenc.inputs.windows import Encoded, encode
from pyglobenc.methods.arguments import takes
from pyglobenc.methods.builders import Rows
from pyglobenc.methods.cross.attribution import CrossAttribution
from pyglobenc.methods.head import find_logits, rounding
from pyglobenc.methods.inputs import check_evaluation, require_finite
from pyglobenc.methods.registry import METHODS, find_method
from pyglobenc.results.generation import GenerationAttribution

WHO = "explain_generation"
# A conversation: dicts with "role" and "content".
Messages = Sequence[Mapping[str, Any]]
GREEDY, GIVEN = "generated, always the most probable token", "given"


@takes_pipelines
@known_arguments
def explain_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    method: str = "gradient-x-input",
    *,
    max_new_tokens: int | None = None,
    answer: str | Sequence[int] | None = None,
    start_layer: int = 0,
    max_length: int | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> GenerationAttribution:
    """Compute how much each token of a prompt and its answer contributes to each token of the answer.

    The model runs once over prompt and answer. Methods that explain the next token then take one backward
    pass for each token of the answer, all on one graph, with one gradient in memory at a time. Rollouts
    explain the position before each token in one pass. Each row is what `explain` gives for the text up to
    that token.

    Args:
        model: a transformers language model (decoder) of a known architecture, in evaluation mode. Or an
            encoder-decoder that `CrossAttribution` takes, with the method "gradient-rollout": the prompt is
            its source, and the decoder's start token counts as the prompt's last token. Or a text-generation
            pipeline, in place of model and tokenizer.
        tokenizer: the model's tokenizer.
        prompt: a text; or a conversation, a list of messages with "role" and "content", which the tokenizer's
            chat template makes a text of. The model's answer follows the last message, or continues it if
            its role is "assistant".
        method: a name in `pyglobenc.methods.registry.METHODS`: one that explains the next token or a token's
            position.
        max_new_tokens: generate up to so many tokens, always the most probable one. The sampling settings of
            the model's generation config aren't used, only its end tokens. None means 20.
        answer: the text or the token ids of an answer to explain, such as one that `model.generate` sampled.
            None lets the model generate one.
        start_layer: the lowest layer of the rollout, as for `explain`.
        max_length: largest number of tokens of prompt and answer together. None: the limit of the model.
        backend, dtype: as for `GlobEnc`.

    Returns:
        GenerationAttribution with scores (T, n) for T tokens of the answer.

    Raises:
        TypeError, ValueError: the prompt or answer is empty, too long, or has another type; the tokenizer has
            no chat template for messages; the model isn't a causal language model; the method explains
            neither the next token nor a position; the forward pass over prompt and answer gives other logits
            than generation did; or the method refuses the input.
    """
    options = Options(
        method=method, start_layer=start_layer, max_length=max_length, backend=backend, dtype=dtype
    )
    if answer is not None and max_new_tokens is not None:
        raise ValueError(
            f"{WHO}: give max_new_tokens to generate an answer, or answer to explain it, not both"
        )
    count = 20 if max_new_tokens is None else max_new_tokens
    if count < 1:
        raise ValueError(f"{WHO}: max_new_tokens must be at least 1, got {count}")
    chosen = find_method(method, WHO)
    if chosen.target == "class" and not chosen.next_token:
        able = ", ".join(one.name for one in METHODS.values() if one.target == "token" or one.next_token)
        raise ValueError(f"{WHO}: {method} explains a class of the whole text; choose one of {able}")
    runner = Runner(model, tokenizer, options)
    if runner.source:
        return explain_target(runner, prompt, answer, count)
    check_language_model(runner)
    limit = longest(runner.model, tokenizer, max_length)
    encoded = _encode(tokenizer, prompt, limit)
    n = len(encoded.tokens)
    ids = None if answer is None else _answer_ids(runner, answer)
    # The last token of the answer is explained, but not read.
    more = count if ids is None else len(ids)
    if limit is not None and n + more - 1 > limit:
        raise ValueError(
            f"{WHO}: the prompt has {n} tokens and the answer up to {more}, of which {limit + 1} fit"
        )
    logits = None
    if ids is None:
        ids, logits = generate(runner.called, tokenizer, encoded.inputs["input_ids"], count)
    whole = followed_by(encoded, ids, tokenizer)
    rows = _rows(runner, whole, n)
    if logits is not None:
        _check_same(runner, logits, rows.logits)
    return _result(runner, whole, n, rows, GREEDY if answer is None else GIVEN)


def explain_target(
    runner: Runner, source: str | Messages, answer: str | Sequence[int] | None, count: int
) -> GenerationAttribution:
    """Explain each token of an encoder-decoder's answer to a source.

    The arguments are those of `explain_generation`; `count` is max_new_tokens.
    """
    model, tokenizer, options = runner.called, runner.tokenizer, runner.options
    start = start_token(model)
    if model.get_output_embeddings() is None or start is None:
        raise ValueError(f"{WHO}: {type(model).__name__} generates no text, or its config has no start token")
    if not isinstance(source, str):
        raise TypeError(f"{WHO}: an encoder-decoder takes a text as its prompt, got {f'{source!r}'[:80]}")
    encoded = encode(tokenizer, source, "the prompt", longest(model, tokenizer, options.max_length))
    inputs = {"input_ids": torch.tensor([encoded.inputs["input_ids"]], device=model.device)}
    if answer is None:
        ids = generate_target(model, tokenizer, inputs, start, count)
    elif isinstance(answer, str):
        given = tokenizer(text_target=answer, add_special_tokens=False, verbose=False)["input_ids"]
        ids = _answer_ids(runner, given)
    else:
        ids = _answer_ids(runner, answer)
    decoder = torch.tensor([[start, *ids[:-1]]], device=model.device)
    at = torch.arange(len(ids), device=model.device)[None]
    attribute = CrossAttribution(model, options.backend, options.dtype)
    result = attribute(
        **inputs, decoder_input_ids=decoder, position=at, target=torch.tensor([ids], device=model.device)
    )
    scores = torch.cat([result.source_scores[0], result.scores[0].to(result.source_scores.device)], 1)
    rows = Rows(scores, torch.zeros(len(ids)), None, find_logits(result.output)[0])
    prompt = followed_by(replace(encoded, text=f"{encoded.text}\n"), [start], tokenizer)
    whole = followed_by(prompt, ids, tokenizer)
    return _result(runner, whole, len(prompt.tokens), rows, GREEDY if answer is None else GIVEN)


def check_language_model(runner: Runner) -> None:
    """Refuse a model that generates no text."""
    name = type(runner.called).__name__
    if not (runner.called is runner.model and is_decoder(runner.model) and name.endswith(LANGUAGE_HEADS)):
        raise ValueError(f"{WHO}: a causal language model with its head (ForCausalLM) is needed, got {name}")
    check_evaluation(WHO, runner.called)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, limit: int | None) -> Encoded:
    """Return the tokens of a prompt or of a conversation."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, "the prompt", limit)
    if (
        not isinstance(prompt, Sequence)
        or not prompt
        or not all(isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in prompt)
    ):
        raise TypeError(
            f"{WHO}: prompt must be a text, or a list of messages with role and content, got "
            f"{f'{prompt!r}'[:80]}"
        )
    own = prompt[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=not own, continue_final_message=own
        )
    # Templates are programs of their own, which raise errors of any kind.
    except Exception as error:
        raise ValueError(f"{WHO}: the tokenizer's chat template takes no such messages: {error}") from error
    # The template writes the special tokens itself.
    encoded = encode(tokenizer, text, "the prompt", limit, add_special_tokens=False)
    known = set(tokenizer.all_special_ids)
    encoded.special = [token in known for token in encoded.inputs["input_ids"]]
    return encoded


def _answer_ids(runner: Runner, answer: str | Sequence[int]) -> list[int]:
    """Return the token ids of a given answer."""
    if isinstance(answer, str):
        ids = runner.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        try:
            ids = [index(i) for i in answer if not isinstance(i, bool)]
        except TypeError:
            ids = None
        if ids is None or len(ids) != len(answer):
            raise TypeError(f"{WHO}: answer must be a text or a list of token ids, got {f'{answer!r}'[:80]}")
    if not ids:
        raise ValueError(f"{WHO}: the answer has no tokens: {answer!r}")
    known = vocabulary(runner.model)
    if not all(0 <= i < known for i in ids):
        raise ValueError(f"{WHO}: answer must hold token ids in [0, {known}), got {min(ids)} to {max(ids)}")
    return ids


def _rows(runner: Runner, whole: Encoded, n: int) -> Rows:
    """Return the rows of scores (1, T, length - 1) of the tokens after a prompt of n tokens.

    Raises:
        ValueError: a row has a score at its own token or a later one, so the model isn't causal.
    """
    # The last token isn't read, since no logit after it is explained.
    length = len(whole.tokens) - 1
    device = runner.model.device
    at = torch.arange(n - 1, length, device=device)
    # The logits of a long prompt would take 4 bytes for each token and each entry of the vocabulary.
    options = {"logits_to_keep": at} if takes(runner.called, "logits_to_keep") else {}
    targets, explained = at[None], {}
    if runner.method.target == "class":
        targets, explained = (
            torch.tensor([whole.inputs["input_ids"][n:]], device=device),
            {"position": targets},
        )
    rows = runner.one_pass(whole, list(range(length)), targets, options, **explained)
    logits = find_logits({"logits": rows.logits})
    if logits is None or logits.shape[1] not in (len(at), length):
        raise ValueError(f"{WHO}: {type(runner.called).__name__} gives no logits for each token")
    logits = logits[0, -len(at) :]
    # A NaN weight may affect the logits but not the scores.
    require_finite(WHO, runner.called, (logits,))
    later = torch.ones_like(rows.scores[0], dtype=torch.bool).triu(n)
    scores = rows.scores[0]
    # Occlusion subtracts logits of different passes, so that its zeros are off by a few roundings.
    size = max(float(scores.abs().max()), float(logits.abs().max()))
    if bool((scores.abs()[later] > rounding(logits) * size).any()):
        raise ValueError(
            f"{WHO}: a token depends on tokens after it, so {type(runner.called).__name__} isn't causal"
        )
    return Rows(scores.masked_fill(later, 0), rows.log_scale[0], rows.targets, logits, rows.error)


def _check_same(runner: Runner, generated: Tensor, logits: Tensor) -> None:
    """Refuse logits (T, V) of the pass over prompt and answer that differ from those of generation.

    With a cache a model computes the same function in other steps, so half of the digits must agree. Models
    may compute parts in float32, such as the softmax of eager attention.
    """
    dtypes = (generated.dtype, logits.dtype, torch.float32)
    narrow = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    a, b = (t.double() - t.double().mean(-1, keepdim=True) for t in (generated, logits.to(generated.device)))
    apart = (a - b).norm(dim=-1) / a.norm(dim=-1)
    most = torch.finfo(narrow).eps ** 0.5
    if not bool((apart <= most).all()):
        worst = int(apart.nan_to_num(torch.inf).argmax())
        raise ValueError(
            f"{WHO}: {type(runner.called).__name__} gives other logits with its cache than in one pass over "
            f"the whole text: those of generated token {worst} differ by {float(apart[worst]):.2g} of their "
            "norm; generate the text yourself and give it as answer"
        )


def _result(runner: Runner, whole: Encoded, n: int, rows: Rows, how: str) -> GenerationAttribution:
    ids = whole.inputs["input_ids"]
    chances = (
        rows.logits.double().softmax(-1).gather(1, torch.tensor(ids[n:], device=rows.logits.device)[:, None])
    )
    scores = torch.nn.functional.pad(rows.scores, (0, 1)).cpu().numpy()
    error = None if rows.error is None else [one if one == one else None for one in rows.error[0].tolist()]
    return GenerationAttribution(
        whole.text,
        whole.tokens,
        ids,
        whole.special,
        n,
        scores,
        chances[:, 0].clamp(max=1).tolist(),
        runner.method.name,
        runner.model_name,
        runner.method.target,
        rows.log_scale.tolist(),
        whole.offsets,
        whole.word_ids,
        error,
        settings={"answer": how} | runner.options.record() | runner.versions,
    )

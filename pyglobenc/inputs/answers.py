"""Answers of language models: their generation, always the most probable token, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyglobenc.inputs.windows import Encoded
from pyglobenc.inputs.words import word_numbers
from pyglobenc.methods.arguments import takes

# The number of tokens of the prompt that an answer is decoded with, so that its spaces are kept.
CONTEXT = 8


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], count: int
) -> tuple[list[int], Tensor]:
    """Generate tokens after a prompt, each time the most probable one, with the model's cache.

    `model.generate` would apply the model's generation config, such as a penalty of repetitions, so that a
    token might not be the one with the largest logit.

    Args:
        model: a language model in evaluation mode.
        tokenizer: its tokenizer; its end token, and those of the model's configs, end the answer.
        ids: ids of the prompt's tokens.
        count: the most tokens.

    Returns:
        The ids of T generated tokens, with the end token if there is one, and their logits (T, V).
    """
    configs = (getattr(model, "generation_config", None), model.config, tokenizer)
    ends = {i for one in configs for i in _listed(getattr(one, "eos_token_id", None))}
    last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    # transformers renamed the argument in 5.23.
    name = "cache" if takes(model, "cache") else "past_key_values"
    answer, rows, cache = [], [], None
    step = torch.tensor([list(ids)], device=model.device)
    while len(answer) < count and not (answer and answer[-1] in ends):
        output = model(input_ids=step, use_cache=True, return_dict=True, **{name: cache}, **last)
        cache = output[name]
        rows.append(output.logits[0, -1])
        answer.append(int(rows[-1].argmax()))
        step = torch.tensor([answer[-1:]], device=model.device)
    return answer, torch.stack(rows)


@torch.no_grad()
def generate_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: dict[str, Tensor],
    start: int,
    count: int,
) -> list[int]:
    """Generate an encoder-decoder's answer to a source, each time the most probable token.

    A first token that the generation config forces, such as that of a language, is taken as it is.

    Args:
        model: an encoder-decoder in evaluation mode.
        tokenizer: its tokenizer; its end token, and those of the model's configs, end the answer.
        source: the inputs of the encoder, such as input_ids (1, n).
        start: id of the decoder's start token.
        count: the most tokens.

    Returns:
        The ids of the generated tokens, without the start token.
    """
    configs = (getattr(model, "generation_config", None), model.config, tokenizer)
    ends = {i for one in configs for i in _listed(getattr(one, "eos_token_id", None))}
    forced = next((i for one in configs for i in _listed(getattr(one, "forced_bos_token_id", None))), None)
    ids, encoded = ([] if forced is None else [forced]), None
    while len(ids) < count and not (ids and ids[-1] in ends):
        step = torch.tensor([[start, *ids]], device=model.device)
        read = source if encoded is None else {"encoder_outputs": encoded}
        output = model(**read, decoder_input_ids=step, use_cache=False, return_dict=True)
        encoded = (output.encoder_last_hidden_state,)
        ids.append(int(output.logits[0, -1].argmax()))
    return ids


def _listed(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def followed_by(text: Encoded, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Return a prompt followed by the tokens of an answer.

    Args:
        text: the prompt's tokens.
        ids: ids of the T tokens of the answer.
        tokenizer: the tokenizer, which decodes the answer behind the prompt's last tokens.

    Returns:
        The tokens of both, n = prompt + T, in one window. The text is that of the prompt with the characters
        that the answer's tokens add; special tokens add none.
    """
    known = set(tokenizer.all_special_ids)
    special = text.special + [token in known for token in ids]
    columns = {name: column + column[-1:] * len(ids) for name, column in text.inputs.items()}
    columns["input_ids"] = text.inputs["input_ids"] + list(ids)
    tokens = text.tokens + [
        # The embedding table may have more rows than the tokenizer has tokens.
        name or str(token)
        for name, token in zip(tokenizer.convert_ids_to_tokens(list(ids)), ids, strict=True)
    ]
    pieces = _pieces(tokenizer, text.inputs["input_ids"][-CONTEXT:], ids)
    offsets, words, whole = text.offsets, text.word_ids, text.text
    if offsets is not None:
        # Special tokens and white space after the prompt's last token belong to no token.
        offsets = list(offsets)
        for piece in pieces:
            offsets.append((len(whole), len(whole) + len(piece)))
            whole += piece
        own = [None if flag else 0 for flag in special[len(text.tokens) :]]
        of_answer = offsets[len(text.tokens) :]
        found = word_numbers(own, of_answer, own, [whole])
        first = max((word for word in words if word is not None), default=-1) + 1
        words = words + [None if word is None else first + word for word in found]
    n = len(tokens)
    return Encoded(whole, columns, tokens, special, words, offsets, 0, [list(range(n))])


def _pieces(tokenizer: PreTrainedTokenizerBase, context: Sequence[int], ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to the text before it; "" for special tokens.

    A character that several tokens spell belongs to the last of them.
    """

    def decoded(count: int) -> str:
        some = [*context, *ids[:count]]
        text = tokenizer.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # Bytes of a character that isn't complete are decoded to this one.
        return text.rstrip("\ufffd")

    pieces, before = [], decoded(0)
    for count in range(1, len(ids) + 1):
        after = decoded(count)
        pieces.append(after[len(before) :] if after.startswith(before) else "")
        before = after
    return pieces

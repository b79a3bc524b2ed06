"""Language models: what is explained is the probability of an answer that follows the prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyglobenc.evaluate.attributions import Attributor
from pyglobenc.evaluate.examples import KEPT, Example, Settings
from pyglobenc.evaluate.forwards import Forwards, Sequences
from pyglobenc.evaluate.kinds.texts import text_examples, text_units
from pyglobenc.evaluate.metrics.rationales import checked_spans
from pyglobenc.hf.limits import vocabulary
from pyglobenc.hf.registry import is_decoder
from pyglobenc.hf.unwrap import called_module, is_stock_model, stock_model
from pyglobenc.inputs.answers import followed_by
from pyglobenc.inputs.batches import Runner, longest
from pyglobenc.inputs.windows import Encoded
from pyglobenc.methods.arguments import run_model, takes
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.inputs import require_finite

# This column of an input holds the id that is predicted at each position, or NOTHING.
ANSWER, NOTHING = "answer", -1
HEADS = ("CausalLM", "LMHeadModel")


def is_language_model(model: nn.Module) -> bool:
    """Return whether the model generates text, with logits (B, n, V) of the next token."""
    called = called_module(model)
    return is_stock_model(called) and type(called).__name__.endswith(HEADS) and is_decoder(called)


class AnswerForwards(Forwards):
    """The plain language model, which gives the log-probability of an answer as its only logit."""

    def check_removal(self, settings: Settings) -> None:
        """Raise ValueError if there is no padding token to replace others, as remove="pad" does here."""
        if settings.remove == "pad" and settings.pad_id is None:
            raise ValueError(
                "evaluate: remove='pad' needs a padding or end token, and the tokenizer has none"
            )

    def chances(self, logits: np.ndarray) -> np.ndarray:
        """Return the probabilities of log-probabilities (N, 1)."""
        return np.exp(logits)

    @torch.inference_mode()
    def next_tokens(self, sequences: Sequences) -> list[int]:
        """Return the id of the most probable next token after each sequence."""
        lengths, found = [len(one["input_ids"]) for one in sequences], {}
        for batch in self._batches(sorted(range(len(sequences)), key=lengths.__getitem__), lengths):
            some = [sequences[i] for i in batch]
            logits = self._logits(some, [[lengths[i] - 1] for i in batch])
            found |= dict(zip(batch, (int(row[0].argmax()) for row in logits), strict=True))
        return [found[i] for i in range(len(sequences))]

    @torch.inference_mode()
    def _run(self, sequences: Sequences) -> list[np.ndarray]:
        """Return the log-probability of each sequence's answer, (1,) float64."""
        start = time.perf_counter()
        places = [[i for i, token in enumerate(one[ANSWER]) if token != NOTHING] for one in sequences]
        rows = []
        for one, at, logits in zip(sequences, places, self._logits(sequences, places), strict=True):
            tokens = torch.tensor([one[ANSWER][i] for i in at], device=logits.device)
            chosen = logits.double().log_softmax(-1).gather(1, tokens[:, None])
            rows.append(chosen.sum()[None].cpu().numpy())
        self.in_model += time.perf_counter() - start
        return rows

    def _logits(self, sequences: Sequences, places: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the logits at some places of each sequence, (places, V)."""
        columns = [{name: column for name, column in one.items() if name != ANSWER} for one in sequences]
        batch, kept = self._batch(columns), sorted(set().union(*places))
        if takes(self.called, "logits_to_keep"):
            # All logits of a batch would take 4 bytes for each token and each entry of the vocabulary.
            batch["logits_to_keep"] = torch.tensor(kept, device=self.model.device)
        else:
            kept = list(range(batch["input_ids"].shape[1]))
        logits = find_logits(run_model(self.called, batch))
        if logits is None or logits.shape[:2] != (len(sequences), len(kept)):
            raise ValueError(f"evaluate: {type(self.called).__name__} gives no logits for each token")
        order = {i: number for number, i in enumerate(kept)}
        rows = [logits[b, [order[i] for i in some]] for b, some in enumerate(places)]
        if len(rows) > 1 and not all(bool(row.isfinite().all()) for row in rows):
            # Where padding is longer than an attention window, some models give NaN for the whole sequence.
            return [self._logits([one], [at])[0] for one, at in zip(sequences, places, strict=True)]
        require_finite("evaluate", self.called, rows)
        return rows


class AnswerAttributor(Attributor):
    """Attributes the tokens of an answer, one after another, to the prompt."""

    def _rows(
        self, runner: Runner, examples: Sequence[Example]
    ) -> Iterator[tuple[int, np.ndarray | ValueError]]:
        """Yield the scores (n,) of each example, or the error of an example that is refused.

        Each token of the answer is explained at the token before it, on the prompt and the answer up to
        there. The score of a prompt token is its mean over the answer's tokens, whose absolute scores are
        scaled to a sum of 1 over the prompt. The scores of a single token stay as they are.
        """
        jobs = [(place, step) for place, one in enumerate(examples) for step in range(len(one.answer))]
        texts, classes = [], []
        for place, step in jobs:
            one = examples[place]
            texts.append(_beginning(one.encoded, len(one.units) - len(one.answer) + 1 + step))
            classes.append(one.answer[step])
        parts: dict[int, list[Any]] = {}
        named = classes if runner.method.target == "class" else None
        for job, fields in self._each(runner, texts, named):
            place, one = jobs[job][0], examples[jobs[job][0]]
            parts.setdefault(place, []).append(fields if isinstance(fields, ValueError) else fields["scores"])
            if len(parts[place]) == len(one.answer):
                yield place, _mean(parts.pop(place), len(one.units), len(one.answer))


def _beginning(text: Encoded, n: int) -> Encoded:
    """Return the first n tokens of a text."""
    columns = {name: getattr(text, name) for name in ("tokens", "special", "word_ids", "offsets", "parts")}
    cut = {name: None if column is None else column[:n] for name, column in columns.items()}
    inputs = {name: column[:n] for name, column in text.inputs.items()}
    return replace(text, inputs=inputs, windows=[list(range(n))], **cut)


def _mean(rows: list[Any], n: int, answer: int) -> np.ndarray | ValueError:
    """Return the mean of the rows over the prompt, (n,), with 0 for the tokens of the answer."""
    for row in rows:
        if isinstance(row, ValueError):
            return row
    scores, prompt = np.zeros(n), n - answer + 1
    for row in rows:
        part = np.asarray(row[:prompt], dtype=np.float64)
        size = abs(part).sum() if answer > 1 else 1
        scores[:prompt] += part / size / len(rows) if size else 0
    return scores


def workers(model: nn.Module, *options: Any) -> tuple[Forwards, Attributor]:
    """Return the runner of a model's forward passes and its attributor, for classes or for answers.

    Args:
        model: a text model.
        options: the other arguments of `Attributor`: tokenizer, batch_tokens, backend and dtype.
    """
    if is_language_model(model):
        return AnswerForwards(model, options[1]), AnswerAttributor(model, *options)
    return Forwards(model, options[1]), Attributor(model, *options)


def text_or_prompt_examples(
    attributor: Attributor,
    forwards: Forwards,
    encoded: Sequence[Encoded],
    labels: Any,
    target: Any,
    answers: Any,
    settings: Settings,
    max_length: int | None,
) -> tuple[list[Example], str]:
    """Return the examples of a classifier's texts or of a language model's prompts, and a note on them.

    Raises:
        TypeError, ValueError: as `text_examples` and `answer_examples`, or a classifier gets answers.
    """
    if isinstance(forwards, AnswerForwards):
        return answer_examples(attributor, forwards, encoded, answers, target, labels, settings, max_length)
    if answers is not None:
        raise ValueError("evaluate: answers need a language model with its head (ForCausalLM)")
    return text_examples(attributor, forwards, encoded, labels, target, settings)


def answer_examples(
    attributor: AnswerAttributor,
    forwards: AnswerForwards,
    encoded: Sequence[Encoded],
    answers: Sequence[str] | None,
    target: int | None,
    labels: Any,
    settings: Settings,
    max_length: int | None,
) -> tuple[list[Example], str]:
    """Return the examples of prompts, and a note on what is explained.

    Args:
        attributor, forwards: of the language model.
        encoded: the tokens of N prompts.
        answers: for each prompt the text that follows it; None for a single token.
        target: id of the token that follows each prompt, without answers. None: the most probable one.
        labels: must be None.
        settings: the settings.
        max_length: as for `evaluate`.

    Raises:
        TypeError, ValueError: the number of answers is wrong, an answer is empty or too long, or the target
            is no token.
    """
    if labels is not None:
        raise ValueError("evaluate: labels are classes, and a language model has none; use answers")
    prompts = [text.inputs for text in encoded]
    if answers is not None:
        ids = _answer_ids(attributor, encoded, answers, target)
        note = "The answers that were given are explained"
    elif target is None:
        ids = [(token,) for token in forwards.next_tokens(prompts)]
        note = "The most probable next token is explained"
    else:
        known = vocabulary(forwards.model)
        if isinstance(target, bool) or not isinstance(target, int | np.integer):
            raise TypeError(f"evaluate: a language model's target must be a token id, got {target!r}")
        if not 0 <= target < known:
            raise ValueError(f"evaluate: target must be a token id in [0, {known}), got {target}")
        ids, note = [(int(target),)] * len(encoded), f"The next token {int(target)} is explained"
    limit = longest(stock_model(attributor.model), attributor.tokenizer, max_length)
    examples = []
    for index, (text, answer) in enumerate(zip(encoded, ids, strict=True)):
        n = len(text.tokens)
        if limit is not None and n + len(answer) - 1 > limit:
            raise ValueError(
                f"evaluate: text {index + 1} and its answer have {n + len(answer)} tokens, of which "
                f"{limit + 1} fit"
            )
        whole = followed_by(text, answer[:-1], attributor.tokenizer)
        units = np.full(n + len(answer) - 1, KEPT)
        units[:n] = text_units(text, n - 1, settings.words)
        inputs = whole.inputs | {ANSWER: [NOTHING] * (n - 1) + list(answer)}
        examples.append(Example(index, inputs, units, 0, np.ones(1), encoded=whole, answer=answer))
    chances = forwards.probabilities([one.inputs for one in examples])
    examples = [replace(one, probabilities=row) for one, row in zip(examples, chances, strict=True)]
    return examples, f"{note}. The last token of the prompt has no rank and is never removed."


def _answer_ids(
    attributor: AnswerAttributor, encoded: Sequence[Encoded], answers: Any, target: Any
) -> list[tuple[int, ...]]:
    """Return the token ids of each answer, without special tokens."""
    if target is not None:
        raise ValueError("evaluate: answers name what is explained, so target must be None")
    if isinstance(answers, str) or len(answers) != len(encoded):
        raise ValueError(f"evaluate: answers must be a list of {len(encoded)} strings, one for each text")
    found = []
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, str):
            raise TypeError(f"evaluate: answer {number} must be a string, got {answer!r}")
        ids = attributor.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise ValueError(f"evaluate: answer {number} has no tokens: {answer!r}")
        found.append(tuple(ids))
    return found


def with_needles(examples: Sequence[Example], needles: Any) -> Sequence[Example]:
    """Check the needles of all texts, and return the examples with them.

    Args:
        examples: N texts.
        needles: for each text, pairs (start, stop) of characters, or None; or None for all texts.

    Returns:
        N examples. `Example.needle` marks the units with a token that shares a character with the needle.

    Raises:
        TypeError, ValueError: as `checked_spans`.
    """
    return [
        replace(one, needle=_needle(one, spans)) if spans else one
        for one, spans in zip(examples, checked_spans(examples, needles, "needles"), strict=True)
    ]


def _needle(example: Example, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    found = np.zeros(example.count, dtype=bool)
    for unit, (start, stop) in zip(example.units, example.encoded.offsets, strict=True):
        if unit != KEPT and any(max(start, low) < min(stop, high) for low, high in spans):
            found[unit] = True
    return found

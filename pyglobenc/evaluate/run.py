"""The function `evaluate`: it attributes texts by several methods, and measures each method by metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyglobenc.common.arguments import known_arguments
from pyglobenc.evaluate import perturbation
from pyglobenc.evaluate.examples import (
    Example,
    Metric,
    Scores,
    Settings,
    make_scores,
    text_units,
)
from pyglobenc.evaluate.table import EvaluationTable
from pyglobenc.inputs.windows import Encoded, Text, encode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyglobenc.evaluate.forwards import Forwards

log = logging.getLogger("pyglobenc")

METRICS: dict[str, Metric] = {metric.name: metric for metric in (*perturbation.METRICS,)}
RANDOM = "random"
# The method "random" is the mean over this many random orders.
DRAWS = 10
ALL = "all"
# The masked copies of so many tokens, at least, are in memory at a time.
PORTION = 1 << 18


@known_arguments
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    methods: str | Sequence[str] = ("globenc", "transformer-attribution", RANDOM),
    metrics: str | Sequence[str] = ("comprehensiveness", "sufficiency"),
    fractions: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.5),
    remove: str = "mask",
    words: bool = False,
    target: int | None = None,
    labels: Sequence[int] | None = None,
    long: str = "error",
    max_length: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    batch_tokens: int = 4096,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> EvaluationTable:
    """Measure attribution methods on a model and data."""
    from pyglobenc.evaluate.forwards import Forwards
    from pyglobenc.hf.labels import probabilities

    settings = Settings(tuple(fractions), remove, tokenizer.mask_token_id, words, seed)
    job = Job(model, tokenizer, settings, batch_tokens, backend, dtype)
    forwards = Forwards(model, batch_tokens)
    encoded = job.encode(texts, max_length, long)
    logits = forwards.logits([text.inputs for text in encoded])
    chances = probabilities(forwards.model.config, _tensor(logits)).numpy()
    targets = chances.argmax(1) if target is None else np.full(len(texts), target)
    explained = job.explained(encoded)
    examples = [
        Example(
            index,
            text.inputs,
            text_units(text, explained[index], words),
            int(targets[index]),
            chances[index],
            None if labels is None else labels[index],
            text,
        )
        for index, text in enumerate(encoded)
    ]
    chosen = [METRICS[name] for name in metrics]
    per_text: dict[tuple[str, str], np.ndarray] = {}
    found = {method: job.scores(method, examples) for method in methods}
    for part in portions(examples, 10):
        measure(forwards, part, {m: [f.scores[e.index] for e in part] for m, f in found.items()}, chosen,
                settings, per_text, len(examples))  # fmt: skip
    of_method = {
        method: {"seconds_per_text": one.seconds / len(texts), "ties": one.ties, "zeros": one.zeros}
        for method, one in found.items()
    }
    return EvaluationTable(per_text, of_method, bootstrap, seed, [], {})


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


@dataclass
class Found:
    """The scores of one method.

    Attributes:
        scores: for each example its scores, one or several draws.
        seconds: seconds of the attribution.
        ties: number of examples in which two units have the same score.
        zeros: number of examples whose scores are all zero.
    """

    scores: list[list[Scores]]
    seconds: float
    ties: int
    zeros: int


class Job:
    """What all methods share: the model, the tokenizer and the settings."""

    def __init__(self, model, tokenizer, settings, batch_tokens, backend, dtype):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.batch_tokens, self.backend, self.dtype = batch_tokens, backend, dtype

    def runner(self, method: str) -> Any:
        """Return a runner of a method; methods that explain a class compute in float64 by default."""
        import torch

        from pyglobenc.inputs.batches import Runner
        from pyglobenc.inputs.options import Options
        from pyglobenc.methods.registry import find_method

        dtype = self.dtype
        if dtype is None and find_method(method).target == "class":
            dtype = torch.float64
        return Runner(
            self.model, self.tokenizer, Options(method, backend=self.backend, dtype=dtype, packed=None)
        )

    def encode(self, texts: Sequence[Text], max_length: int | None, long: str) -> list[Encoded]:
        """Tokenize all texts."""
        from pyglobenc.explain import check_texts
        from pyglobenc.hf.unwrap import stock_model
        from pyglobenc.inputs.batches import longest

        names = check_texts(texts)
        limit = longest(stock_model(self.model), self.tokenizer, max_length)
        return [
            encode(self.tokenizer, text, name, limit, long) for text, name in zip(texts, names, strict=True)
        ]

    def fields(
        self, method: str, encoded: Sequence[Encoded], targets: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return the fields of the attribution of each text, computed in batches of texts of like length."""
        from dataclasses import replace

        from pyglobenc.inputs.batching import buckets

        runner, found = self.runner(method), [None] * len(encoded)
        for bucket in buckets(list(enumerate(encoded)), self.batch_tokens):
            width = max(len(text.tokens) for _, text in bucket)
            runner.options = replace(runner.options, batch_size=max(1, self.batch_tokens // width))
            classes = None
            if targets is not None and runner.method.target == "class":
                classes = [int(targets[index]) for index, _ in bucket]
            results = runner.run([text for _, text in bucket], classes)
            for (index, _), fields in zip(bucket, results, strict=True):
                found[index] = fields
        return found

    def explained(self, encoded: Sequence[Encoded]) -> list[int | None]:
        """Return the position of the token that the head reads in each text; None for a mean over tokens."""
        return [
            fields["target"] if fields["target_kind"] == "token" else None
            for fields in self.fields("raw-attention", encoded)
        ]

    def scores(self, method: str, examples: Sequence[Example]) -> Found:
        """Return a method's scores for all examples."""
        start, seed = time.perf_counter(), self.settings.seed
        if method == RANDOM:
            rows = [
                np.random.default_rng((seed, one.index)).random((DRAWS, len(one.units))) for one in examples
            ]
        else:
            targets = [one.target for one in examples]
            rows = [f["scores"][None] for f in self.fields(method, [e.encoded for e in examples], targets)]
        seconds = time.perf_counter() - start
        scores = [
            [make_scores(one, row, seed, draw) for draw, row in enumerate(some)]
            for one, some in zip(examples, rows, strict=True)
        ]
        ties = sum(any(len(np.unique(s.units)) < len(s.units) for s in some) for some in scores)
        zeros = sum(any(not s.tokens.any() for s in some) for some in scores)
        return Found(scores, seconds, ties, zeros)


def portions(examples: Sequence[Example], copies: int):
    """Yield examples in portions whose masked copies have about PORTION tokens."""
    part: list[Example] = []
    size = 0
    for one in examples:
        more = copies * len(one.units)
        if part and size + more > PORTION:
            yield part
            part, size = [], 0
        part.append(one)
        size += more
    if part:
        yield part


def measure(
    forwards: Forwards,
    examples: Sequence[Example],
    scores: dict[str, list[list[Scores]]],
    metrics: Sequence[Metric],
    settings: Settings,
    per_text: dict[tuple[str, str], np.ndarray],
    total: int,
) -> None:
    """Compute the metrics of some examples for all methods, and put them into `per_text`."""
    import torch

    from pyglobenc.evaluate.perturbation import masked_copy
    from pyglobenc.hf.labels import probabilities

    asked: list[tuple[str, Metric, Example, Scores, int]] = []
    copies: list[dict[str, list[int]]] = []
    for method, of_examples in scores.items():
        for one, draws in zip(examples, of_examples, strict=True):
            for metric in metrics:
                if one.count < 2 and not metric.single:
                    continue
                for draw in draws:
                    queries = metric.queries(one, draw, settings) if metric.queries else []
                    copies += [masked_copy(one, stays, settings) for stays in queries]
                    asked.append((method, metric, one, draw, len(queries)))
    logits = forwards.logits(copies)
    chances = probabilities(forwards.model.config, torch.from_numpy(logits)).numpy()
    start = 0
    values: dict[tuple[str, str, int], list[float]] = {}
    for method, metric, one, draw, count in asked:
        value = metric.value(one, draw, chances[start : start + count], settings)
        start += count
        for key, number in (value if isinstance(value, dict) else {"": value}).items():
            name = f"{metric.name}.{key}" if key else metric.name
            values.setdefault((method, name, one.index), []).append(number)
    for (method, name, index), numbers in values.items():
        column = per_text.setdefault((method, name), np.full(total, np.nan))
        column[index] = np.mean(numbers)

"""Runs masked copies through the plain model: each one once, and those of like length together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyglobenc.evaluate.examples import Example, Metric, Scores, Settings
from pyglobenc.hf.labels import probabilities
from pyglobenc.hf.limits import padding_id
from pyglobenc.hf.trace.checks import check_still
from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.inputs.batching import cached_tokens, in_batches
from pyglobenc.methods.arguments import accepts, run_model
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.inputs import require_finite

Sequences = Sequence[dict[str, list[int]]]
Progress = Callable[[int], Any]
# The value of a metric by method, name of the row, and index of the example.
Values = dict[tuple[str, str, int], float]


class NoClasses(ValueError):
    """The model has no classes with probabilities."""


class Forwards:
    """The plain model, and a count of its forward passes.

    Args:
        model: a transformers model, or a module around one.
        batch_tokens: the most tokens, with padding, in a batch. One sequence may have more. On a CPU a
            batch has fewer, see `cached_tokens`.

    Raises:
        ValueError: the model is in training mode.

    Attributes:
        masks: whether the model takes an attention mask.
        why_no_classes: the reason why the model has no classes; "" before `whole` found one.
        asked, done: number of inputs that were asked for, and of those that were run. Equal ones run once.
        seconds, in_model: seconds in `logits`, and in the model alone.
    """

    # What the model classifies, for messages.
    WHAT = "texts"

    def __init__(self, model: nn.Module, batch_tokens: int):
        self.called = called_module(model)
        self.model = stock_model(self.called)
        # Dropout would change the probabilities at random.
        check_still(self.called)
        self.batch_tokens = cached_tokens(self.model, batch_tokens)
        self.padding, self.masks = padding_id(self.model), accepts(self.called, "attention_mask")
        self.why_no_classes = ""
        self.asked = self.done = 0
        self.seconds = self.in_model = 0.0

    def check_removal(self, settings: Settings) -> None:
        """Raise ValueError if the model can't hide tokens, as remove="pad" does."""
        if settings.remove == "pad" and not self.masks:
            name = type(self.called).__name__
            raise ValueError(f"evaluate: remove='pad' needs an attention mask, and {name} takes none")

    def whole(self, sequences: Sequences) -> np.ndarray | None:
        """Return the class probabilities of whole inputs, (N, classes).

        None if the model has no classes. The reason is then in `why_no_classes`.
        """
        try:
            return self.probabilities(sequences)
        except NoClasses as error:
            self.why_no_classes = str(error)
            return None

    def probabilities(self, sequences: Sequences, progress: Progress = lambda count: None) -> np.ndarray:
        """Return the class probabilities of sequences, (N, classes); arguments and errors as for `logits`."""
        return self.chances(self.logits(sequences, progress))

    def chances(self, logits: np.ndarray) -> np.ndarray:
        """Return the class probabilities of logits (N, classes); NoClasses if there are none."""
        chances = probabilities(self.model.config, torch.from_numpy(logits))
        if chances is None:
            raise NoClasses(f"the head of {type(self.model).__name__} is a regression")
        return chances.numpy()

    def logits(self, sequences: Sequences, progress: Progress = lambda count: None) -> np.ndarray:
        """Return the logits of sequences.

        Args:
            sequences: N inputs of the model by name, each with a list of one number for every token.
            progress: called with a number of sequences whenever that many are done.

        Returns:
            (N, classes) float64. A sequence without tokens gets NaN.

        Raises:
            NoClasses: the model has no head with logits (B, classes).
            ValueError: logits aren't finite.
        """
        start = time.perf_counter()
        numbers: dict[Any, int] = {}
        places = [numbers.setdefault(_key(sequence), len(numbers)) for sequence in sequences]
        unique: list[Any] = [None] * len(numbers)
        for place, sequence in zip(places, sequences, strict=True):
            unique[place] = sequence
        self.asked += len(sequences)
        progress(len(sequences) - len(unique))
        order = sorted(
            (i for i, one in enumerate(unique) if one["input_ids"]),
            key=lambda i: len(unique[i]["input_ids"]),
        )
        progress(len(unique) - len(order))
        rows: dict[int, np.ndarray] = {}
        for batch in self._batches(order, [len(one["input_ids"]) for one in unique]):
            results = in_batches(lambda some: self._run([unique[i] for i in some]), batch, len(batch))
            rows |= dict(results)
            progress(len(batch))
        self.done += len(order)
        width = len(next(iter(rows.values()), ()))
        found = np.full((len(unique), width), np.nan)
        for place, row in rows.items():
            found[place] = row
        self.seconds += time.perf_counter() - start
        return found[places]

    def copy(self, example: Example, stays: np.ndarray, settings: Settings) -> dict[str, list[int]]:
        """Return an input without some of its units; see `masked_copy`."""
        return masked_copy(example, stays, settings)

    def _batches(self, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Yield batches of at most batch_tokens tokens, with padding; order is by length."""
        batch: list[int] = []
        for i in order:
            # Without a padding id or an attention mask, texts can't share a batch.
            full = (len(batch) + 1) * lengths[i] > self.batch_tokens or self.padding is None or not self.masks
            if batch and full:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _run(self, sequences: Sequences) -> list[np.ndarray]:
        batch = self._batch(sequences)
        start = time.perf_counter()
        logits = find_logits(run_model(self.called, batch))
        if logits is None or logits.dim() != 2:
            raise NoClasses(f"{type(self.called).__name__} has no head that classifies {self.WHAT}")
        if len(sequences) > 1 and not bool(logits.isfinite().all()):
            # Where padding is longer than an attention window, some models give NaN for the whole sequence.
            return [row for one in sequences for row in self._run([one])]
        require_finite("evaluate", self.called, (logits,))
        rows = list(logits.double().cpu().numpy())
        self.in_model += time.perf_counter() - start
        return rows

    def _batch(self, sequences: Sequences) -> dict[str, Tensor]:
        """Return the inputs (B, n), padded on the right so that positions start at 0."""
        width = max(len(one["input_ids"]) for one in sequences)
        batch = {}
        for name in sequences[0]:
            if name == "attention_mask" or not accepts(self.called, name):
                continue
            fill = (self.padding or 0) if name == "input_ids" else 0
            rows = [one[name] + [fill] * (width - len(one[name])) for one in sequences]
            batch[name] = torch.tensor(rows, device=self.model.device)
        if self.masks:
            rows = [
                one.get("attention_mask", [1] * len(one["input_ids"])) + [0] * (width - len(one["input_ids"]))
                for one in sequences
            ]
            batch["attention_mask"] = torch.tensor(rows, device=self.model.device)
        return batch


def masked_copy(example: Example, stays: np.ndarray, settings: Settings) -> dict[str, list[int]]:
    """Return the model's inputs of a text without some of its units.

    Args:
        example: the text.
        stays: (m,) bool, True for units that stay.
        settings: "mask" replaces the tokens by the mask token. "delete" takes them out, so that later tokens
            move up. "pad" hides them through the attention mask, and the other tokens keep their positions;
            for a language model it replaces them by the padding token, as FlashTrace does.

    Returns:
        The inputs by name, with at most n numbers each.
    """
    # The last entry belongs to KEPT, which is -1.
    present = np.append(stays, True)[example.units].tolist()
    if settings.remove == "delete":
        return {
            name: [value for value, here in zip(column, present, strict=True) if here]
            for name, column in example.inputs.items()
        }
    if settings.remove == "pad" and example.answer is None:
        return example.inputs | {"attention_mask": [int(here) for here in present]}
    ids = example.inputs["input_ids"]
    other = settings.pad_id if settings.remove == "pad" else settings.mask_id
    return example.inputs | {
        "input_ids": [value if here else other for value, here in zip(ids, present, strict=True)]
    }


def measure(
    forwards: Forwards,
    examples: Sequence[Example],
    scores: Mapping[str, Sequence[list[Scores]]],
    metrics: Sequence[Metric],
    settings: Settings,
    progress: Callable[[int, int], Any] = lambda count, total: None,
) -> Values:
    """Compute metrics of some examples, with the masked copies of all of them and all methods in one pool.

    Args:
        forwards: the plain model.
        examples: the examples.
        scores: for each method the scores of each example: one entry, or several draws, whose values are
            averaged.
        metrics: the metrics.
        settings: the settings.
        progress: called with a number of masked copies whenever that many are done, and with their total.

    Returns:
        The values. An example that can't be measured has none.
    """
    asked: list[tuple[str, Metric, Example, Scores, list[int]]] = []
    pool: list[dict[str, list[int]]] = []
    for place, one in enumerate(examples):
        # Different metrics and methods often ask for the same copy.
        known: dict[bytes, int] = {}
        for method, of_examples in scores.items():
            for draw in of_examples[place]:
                for metric in metrics:
                    if one.count > 1 or metric.single:
                        copies = _places(forwards, one, draw, metric, settings, known, pool)
                        asked.append((method, metric, one, draw, copies))
    forwards.asked += sum(len(places) for *_, places in asked) - len(pool)
    report = partial(progress, total=len(pool))
    logits = forwards.logits(pool, report) if pool else np.zeros((0, 0))
    chances = forwards.chances(logits) if pool else logits
    draws: dict[tuple[str, str, int], list[float]] = {}
    for method, metric, one, draw, places in asked:
        given = logits if "decoder" in metric.needs else chances
        value = metric.value(one, draw, given[places], settings)
        for key, number in (value if isinstance(value, dict) else {"": value}).items():
            name = f"{metric.name}.{key}" if key else metric.name
            draws.setdefault((method, name, one.index), []).append(number)
    return {key: float(np.mean(numbers)) for key, numbers in draws.items()}


def _places(
    forwards: Forwards,
    example: Example,
    scores: Scores,
    metric: Metric,
    settings: Settings,
    known: dict[bytes, int],
    pool: list[dict[str, list[int]]],
) -> list[int]:
    """Return the places in the pool of a metric's masked copies; those that aren't there yet are added."""
    places = []
    for stays in metric.queries(example, scores, settings) if metric.queries else []:
        key = stays.tobytes()
        if key not in known:
            known[key] = len(pool)
            pool.append(forwards.copy(example, stays, settings))
        places.append(known[key])
    return places


def _key(sequence: dict[str, list[int]]) -> Any:
    return tuple(tuple(column) for column in sequence.values())

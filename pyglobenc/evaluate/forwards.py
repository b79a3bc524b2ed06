"""Runs many short inputs through the plain model: each one once, and those of like length together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyglobenc.hf.limits import padding_id
from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.inputs.batching import in_batches
from pyglobenc.methods.arguments import accepts, run_model
from pyglobenc.methods.head import find_logits

Sequences = Sequence[dict[str, list[int]]]


class Forwards:
    """The plain model, and a count of its forward passes.

    Attributes:
        asked, done: number of inputs that were asked for, and of those that were run. Equal ones run once.
        seconds, in_model: seconds in `logits`, and in the model alone.
    """

    def __init__(self, model: nn.Module, batch_tokens: int):
        self.called, self.batch_tokens = called_module(model), batch_tokens
        self.model = stock_model(self.called)
        self.padding, self.masks = padding_id(self.model), accepts(self.called, "attention_mask")
        self.asked = self.done = 0
        self.seconds = self.in_model = 0.0

    def logits(self, sequences: Sequences, progress: Callable[[int], Any] = lambda count: None) -> np.ndarray:
        """Return the logits of sequences.

        Args:
            sequences: N inputs of the model by name, each with a list of one number for every token.
            progress: called with a number of sequences whenever that many are done.

        Returns:
            (N, classes) float64. A sequence without tokens gets NaN.

        Raises:
            ValueError: the model has no head with logits (B, classes).
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
            raise ValueError(f"evaluate: {type(self.called).__name__} has no head that classifies texts")
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


def _key(sequence: dict[str, list[int]]) -> Any:
    return tuple(tuple(column) for column in sequence.values())

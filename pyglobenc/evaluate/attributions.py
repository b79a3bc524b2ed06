"""Attributes texts by one method after another, in batches of texts of like length."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyglobenc.evaluate.examples import KEPT, Example, Scores, make_scores
from pyglobenc.inputs.batches import Runner
from pyglobenc.inputs.batching import buckets, cached_tokens
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.windows import Encoded
from pyglobenc.methods.precision.reliability import NoRelevanceWarning
from pyglobenc.methods.registry import RELEVANCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The name of the baseline that ranks units at random, and the number of orders that it is the mean of.
RANDOM, DRAWS = "random", 10
# The cheapest method that knows which token the head reads.
CHEAPEST = "raw-attention"
Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Attributed:
    """The scores of one method for all N examples.

    Attributes:
        tokens: the scores of all examples' tokens, one after the other, float64; NaN where the method refused
            the example. For images they are those of patches or pixels. None for random orders.
        starts: (N + 1,) int64, where each example's scores begin.
        seconds: seconds that the attribution took.
        reason: the first reason why an example was refused; "" if none was.
    """

    tokens: np.ndarray | None
    starts: np.ndarray
    seconds: float = 0.0
    reason: str = ""

    def __post_init__(self):
        # These come from a file as arrays without axes.
        if self.tokens is not None and not len(self.tokens):
            object.__setattr__(self, "tokens", None)
        object.__setattr__(self, "seconds", float(self.seconds))
        object.__setattr__(self, "reason", str(self.reason))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the fields as arrays, to keep in a file."""
        tokens = np.zeros(0) if self.tokens is None else self.tokens
        return {name: np.asarray(value) for name, value in (vars(self) | {"tokens": tokens}).items()}

    def scores(self, example: Example, seed: int, **fields: Any) -> list[Scores]:
        """Return the scores of an example: one entry, or several random draws; [] if it was refused."""
        rows = self._rows(example, seed)
        if np.isnan(rows).any():
            return []
        return [make_scores(example, row, seed, draw, **fields) for draw, row in enumerate(rows)]

    def _rows(self, example: Example, seed: int) -> np.ndarray:
        if self.tokens is None:
            return random_rows(example, seed)
        return self.tokens[None, self.starts[example.index] : self.starts[example.index + 1]]

    def summary(self, examples: Sequence[Example], seed: int) -> dict[str, float]:
        """Return seconds_per_text, and counts of the examples with equal scores and with no score but 0.

        Equal scores are those of units; of an image, those of patches, or of pixels if the method scores
        pixels.
        """
        ties = zeros = 0
        for one in examples:
            rows = self._rows(one, seed)
            if np.isnan(rows).any():
                continue
            units = [draw.units for draw in self.scores(one, seed)] if one.grid is None else rows
            ties += any(len(np.unique(row)) < len(row) for row in units)
            zeros += any(not row.any() for row in rows)
        return {"seconds_per_text": self.seconds / len(examples), "ties": ties, "zeros": zeros}

    def notes(self, method: str) -> list[str]:
        """Return a note on the examples that the method refused, if there are any."""
        if not self.reason:
            return []
        refused = int(np.isnan(np.add.reduceat(self.tokens, self.starts[:-1])).sum())
        return [f"{method} refuses {refused} texts, the first one because {self.reason}."]


def random_rows(example: Example, seed: int) -> np.ndarray:
    """Return random scores of an example's tokens, (DRAWS, n), whose sums over units are uniform.

    Those of an image are scores of its patches, (DRAWS, patches).
    """
    generator = np.random.default_rng((seed, example.index))
    if example.grid is not None:
        return generator.random((DRAWS, example.grid[0] * example.grid[1]))
    units, tokens = generator.random((DRAWS, example.count)), generator.random((DRAWS, len(example.units)))
    inside = example.units != KEPT
    sizes = np.bincount(example.units[inside], minlength=example.count)
    tokens[:, inside] = (units / np.maximum(sizes, 1))[:, example.units[inside]]
    return tokens


class Attributor:
    """Attributes texts by methods of the registry.

    Args:
        model, tokenizer, backend, dtype: as for `pyglobenc.explain`. With dtype None, methods that propagate
            relevance compute in float64.
        batch_tokens: the most tokens, with padding, that the model gets at once. One text may have more.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_tokens: int,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.batch_tokens = cached_tokens(model, batch_tokens)
        self.backend, self.dtype = backend, dtype

    def of(self, model: PreTrainedModel) -> Attributor:
        """Return an attributor of another model, with the same settings."""
        return type(self)(model, self.tokenizer, self.batch_tokens, self.backend, self.dtype)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the tokenizer."""
        from pyglobenc.scale.corpus.manifest import tokenizer_fingerprint

        return tokenizer_fingerprint(self.tokenizer)

    def runner(self, method: str) -> Runner:
        """Return the runner of a method.

        Raises:
            TypeError, ValueError: the method refuses the model.
        """
        dtype = torch.float64 if method in RELEVANCE else None
        options = Options(method, backend=self.backend, dtype=self.dtype or dtype, packed=None)
        return Runner(self.model, self.tokenizer, options)

    def explained(self, texts: Sequence[Encoded]) -> tuple[list[int | None], str]:
        """Return the position of the token that the head reads in each text, and a note on it.

        The position is None where the head reads a mean of tokens, or where it isn't known.
        """
        found: list[int | None] = [None] * len(texts)
        try:
            for index, fields in self._each(self.runner(CHEAPEST), texts, None):
                if isinstance(fields, ValueError):
                    raise fields
                found[index] = fields["target"] if fields["target_kind"] == "token" else None
        except ValueError as error:
            reason = str(error).removeprefix("explain: ")
            return [None] * len(texts), f"Every token of the text has a rank: {reason}."
        own = sum(p is not None and not text.special[p] for p, text in zip(found, texts, strict=True))
        if own:
            where = f"The head reads a token of the text in {own} of {len(texts)} texts"
            return found, f"{where}. That token has no rank and is never removed, whatever the method."
        where = "the mean of all tokens" if None in found else "a special token"
        return found, f"The head reads {where}. Special tokens have no rank and are never removed."

    def attribute(
        self, method: str, examples: Sequence[Example], progress: Progress = lambda count: None
    ) -> Attributed:
        """Attribute all examples by one method.

        Args:
            method: a name in `pyglobenc.methods.registry.METHODS`, or RANDOM.
            examples: N texts. Methods that explain a class explain `Example.target`.
            progress: called with a number of examples whenever that many are done.

        Returns:
            Attributed, with NaN for the examples that the method refused.

        Raises:
            TypeError, ValueError: the method refuses the model, or every example.
        """
        starts = np.cumsum([0] + [len(one.units) for one in examples])
        if method == RANDOM:
            progress(len(examples))
            return Attributed(None, starts)
        begun, tokens, reasons = time.perf_counter(), np.full(starts[-1], np.nan), {}
        for index, row in self._rows(self.runner(method), examples):
            if isinstance(row, ValueError):
                reasons[index] = row
            else:
                tokens[starts[index] : starts[index + 1]] = row
            progress(1)
        if len(reasons) == len(examples):
            raise reasons[0]
        reason = str(reasons[min(reasons)]).removeprefix("explain: ") if reasons else ""
        return Attributed(tokens, starts, time.perf_counter() - begun, reason)

    def _rows(
        self, runner: Runner, examples: Sequence[Example]
    ) -> Iterator[tuple[int, np.ndarray | ValueError]]:
        """Yield the scores (n,) of each example, or the error of an example that is refused."""
        classes = [one.target for one in examples] if runner.method.target == "class" else None
        if classes is not None and None in classes:
            classes = None
        for index, fields in self._each(runner, [one.encoded for one in examples], classes):
            yield index, fields if isinstance(fields, ValueError) else fields["scores"]

    def _each(
        self, runner: Runner, texts: Sequence[Encoded], classes: Sequence[int] | None
    ) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        for bucket in buckets(list(enumerate(texts)), self.batch_tokens):
            yield from self._some(runner, bucket, classes)

    def _some(
        self, runner: Runner, bucket: list[tuple[int, Encoded]], classes: Sequence[int] | None
    ) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        """Yield the fields of each text of a bucket, or the error of a text that is refused alone too."""
        width = max(len(text.tokens) for _, text in bucket)
        runner.options = replace(runner.options, batch_size=max(1, self.batch_tokens // width))
        chosen = None if classes is None else [classes[index] for index, _ in bucket]
        try:
            with warnings.catch_warnings():
                # The table counts examples without relevance.
                warnings.simplefilter("ignore", NoRelevanceWarning)
                names = [f"text {index + 1}" for index, _ in bucket]
                done: list[Any] = list(runner.run([text for _, text in bucket], chosen, names))
        except ValueError as error:
            if len(bucket) > 1:
                for item in bucket:
                    yield from self._some(runner, [item], classes)
                return
            done = [error]
        yield from ((index, fields) for (index, _), fields in zip(bucket, done, strict=True))

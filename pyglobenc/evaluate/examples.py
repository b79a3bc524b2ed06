"""What a metric is given: an example, the scores of a method for it, and the settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from pyglobenc.inputs.windows import Encoded

REMOVALS = ("mask", "delete", "pad")
# A unit that is never removed has this number.
KEPT = -1

Span = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """The settings that metrics read; see `pyglobenc.evaluate`."""

    fractions: tuple[float, ...]
    remove: str = "mask"
    mask_id: int | None = None
    pad_id: int | None = None
    words: bool = False
    seed: int = 0
    protocol: str | None = None
    top_k: int | float | None = None


@dataclass(frozen=True)
class Marked:
    """The words of a text, and which of them people marked.

    Attributes:
        words: W pairs (start, stop) of characters, ascending.
        spans: the numbers of the words that each highlighted span touches, without duplicates.
        truth: (W,) bool, the highlighted words.
        unknown: (n,) bool, True for tokens that the tokenizer doesn't know.
    """

    words: list[Span]
    spans: list[range]
    truth: np.ndarray
    unknown: np.ndarray

    def listed(self) -> list[Any]:
        """Return the number of words, and for each span its first word and the one after its last."""
        return [len(self.words), *([span.start, span.stop] for span in self.spans)]


@dataclass(frozen=True)
class Example:
    """One text or image, before any method ran.

    Attributes:
        index: its number among the texts or images.
        inputs: the model's inputs of a text, each of n numbers; or the pixels (C, height, width) of an image.
        units: (n,) int64, the unit of each token, from 0 to m - 1. A unit is a token or a word; of an image
            it is a pixel or a patch. KEPT marks tokens that are never removed: special tokens, and the unit
            of the token that the head reads.
        target: the class that is explained.
        probabilities: (classes,) float64, of the whole input.
        label: the true class, or None.
        encoded: the tokens, words and offsets of a text. For a language model, the prompt is followed by the
            answer without its last token.
        answer: ids of the answer's tokens, for a language model. The probabilities then hold the answer's
            alone, as class 0.
        rationale: the words of a text that people marked; None without highlights.
        needle: (m,) bool, the units that the answer is known to depend on, or None.
        mask: (height, width) int8, the true segmentation of an image: 1 for the object, 0 for the rest, and
            -1 for pixels that don't count.
        grid: rows and columns of an image's patches. None for a text.
    """

    index: int
    inputs: dict[str, list[int]] | Tensor
    units: np.ndarray
    target: int
    probabilities: np.ndarray
    label: int | None = None
    encoded: Encoded | None = None
    answer: tuple[int, ...] | None = None
    rationale: Marked | None = None
    needle: np.ndarray | None = None
    mask: np.ndarray | None = None
    grid: tuple[int, int] | None = None

    def spread(self, scores: np.ndarray) -> np.ndarray:
        """Return scores of an image's patches as scores of its pixels, (n,), by bilinear interpolation.

        Args:
            scores: (patches,), or (n,) of tokens or pixels, which stay unchanged.
        """
        if self.grid is None or len(scores) == len(self.units):
            return scores
        from pyglobenc.viz.image import upscale

        return upscale(scores.reshape(self.grid), *self.inputs.shape[1:]).ravel()

    def record(self) -> list[Any]:
        """Return what identifies the example, as JSON values; arrays and pixels by their SHA-256."""
        rationale = None if self.rationale is None else self.rationale.listed()
        needle = None if self.needle is None else self.needle.tolist()
        record = [self.units.tolist(), self.target, self.label, rationale, needle]
        if self.grid is None:
            return [self.inputs, *record]
        mask = None if self.mask is None else _sha256(self.mask)
        return [_sha256(self.inputs.double().cpu().numpy()), len(self.units), *record[1:], mask]

    @property
    def count(self) -> int:
        """Return the number of units, m."""
        return int(self.units.max(initial=KEPT)) + 1


@dataclass(frozen=True)
class Scores:
    """The scores of one method for one example.

    Attributes:
        tokens: (n,) float64, the scores of all tokens, with those that are never removed.
        units: (m,) float64, the score of each unit: the sum of its tokens' scores.
        order: (m,) int64, the units from the highest score to the lowest. Equal scores are in random order.
        references: scores of other methods by name, for metrics that compare with them.
        layers: (L, n) float64, scores after each layer; None where no metric needs them.
    """

    tokens: np.ndarray
    units: np.ndarray
    order: np.ndarray
    references: dict[str, Scores] = field(default_factory=dict)
    layers: np.ndarray | None = None


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: the name that users give.
        summary: one line, with the paper.
        value: function of an example, a method's scores, the probabilities (queries, classes) of the masked
            copies, and the settings. A metric that needs a decoder gets the answer's log-probabilities
            (queries, 1) instead, because the probability of a long answer may be 0 in float64. It returns a
            number, or a dict of numbers: the number at key becomes the row name.key, and the one at ""
            becomes the row name. NaN leaves the example out and counts it.
        queries: function of an example, scores and settings. It returns the masked copies that the metric
            needs, each as (m,) bool, True for units that stay. None: the metric needs no forward pass.
        needs: what must be there, of "labels", "rationales", "needles", "masks", "classifier" (the
            probability of what is explained), "classes" (those of all classes) and "decoder".
        references: names of methods whose scores are computed too, for `Scores.references`.
        single: whether the metric is also defined for an example with fewer than two units.
        ratios: pairs of keys of what `value` returns. The metric's mean over a data set is then the mean over
            the pairs of (sum at the first key) / (sum at the second key), and the keys get no rows.
    """

    name: str
    summary: str
    value: Callable[[Example, Scores, np.ndarray, Settings], float | dict[str, float]]
    queries: Callable[[Example, Scores, Settings], list[np.ndarray]] | None = None
    needs: frozenset[str] = frozenset()
    references: tuple[str, ...] = ()
    single: bool = False
    ratios: tuple[tuple[str, str], ...] = ()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def ranked(units: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Return the units from the highest score to the lowest, with equal scores in random order.

    Args:
        units: (m,) scores.
        seed: numbers that choose the order of equal scores.

    Returns:
        (m,) int64.
    """
    return np.lexsort((np.random.default_rng(seed).random(len(units)), -units))


def make_scores(example: Example, tokens: np.ndarray, seed: int, draw: int = 0, **fields: Any) -> Scores:
    """Return the scores of an example's tokens (n,) with those of its units, ranked.

    Args:
        example: the example.
        tokens: (n,) scores, or for an image (patches,), which are interpolated to its n pixels.
        seed, draw: choose the order of equal scores, with the example's index.
        fields: other fields of `Scores`.
    """
    tokens = example.spread(np.asarray(tokens, dtype=np.float64))
    inside = example.units != KEPT
    units = np.bincount(example.units[inside], tokens[inside], minlength=example.count)
    return Scores(tokens, units, ranked(units, (seed, example.index, draw)), **fields)

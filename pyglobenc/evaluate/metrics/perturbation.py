"""Faithfulness: how the probability of the explained class changes when units are removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

from pyglobenc.evaluate.examples import Example, Metric, Scores, Settings

CLASSIFIER = frozenset({"classifier"})
# The fractions at which perturbation curves are measured, besides 0.
STEPS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# The logarithm of a probability of 0 would be infinite, so smaller probabilities count as this one.
SMALLEST = float(np.finfo(np.float64).tiny)
# A function that names the masked copies, as in `Metric`.
Queries = Callable[[Example, Scores, Settings], list[np.ndarray]]


def count_of(fraction: float, m: int) -> int:
    """Return how many of m units a fraction is: it is rounded up, and at least 1."""
    # A product such as 0.07 * 100 may lie above the whole number that it stands for.
    return max(1, ceil(round(fraction * m, 9)))


def tops(scores: Scores, fractions: Sequence[float], lowest: bool = False) -> list[np.ndarray]:
    """Return, for each fraction, (m,) bool with True for the highest units, or for the lowest ones."""
    order, found = scores.order[::-1] if lowest else scores.order, []
    for fraction in fractions:
        top = np.zeros(len(order), dtype=bool)
        top[order[: count_of(fraction, len(order))]] = True
        found.append(top)
    return found


def without_tops(example: Example, scores: Scores, settings: Settings) -> list[np.ndarray]:
    """Return the copies without the highest units, one for each fraction."""
    return [~top for top in tops(scores, settings.fractions)]


def only_tops(example: Example, scores: Scores, settings: Settings) -> list[np.ndarray]:
    """Return the copies with the highest units alone, one for each fraction."""
    return tops(scores, settings.fractions)


def steps_down(lowest: bool) -> Queries:
    """Return the queries of a perturbation curve, from the highest units or from the lowest ones."""
    return lambda example, scores, settings: [~top for top in tops(scores, STEPS, lowest)]


def mean_drop(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> float:
    """Return by how much the explained class's probability falls, as a mean over the copies."""
    return float(np.mean(example.probabilities[example.target] - probabilities[:, example.target]))


def log_odds(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> float:
    """Return the mean over the copies of log(p / whole), for the explained class's probabilities."""
    after, before = probabilities[:, example.target], example.probabilities[example.target]
    return float(np.mean(np.log(np.maximum(after, SMALLEST)) - np.log(max(before, SMALLEST))))


def flips(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> float:
    """Return the share of the copies for which the model predicts another class than for the whole input."""
    if np.isnan(probabilities).any():
        return np.nan
    return float(np.mean(probabilities.argmax(1) != example.probabilities.argmax()))


def curve(
    example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Return the explained class's probability at each step, and the area under the curve at "".

    The curve begins with the whole input. Its area is divided by its width, so it is a mean probability.
    """
    points = np.append(example.probabilities[example.target], probabilities[:, example.target])
    widths = np.diff((0.0, *STEPS))
    area = float(((points[1:] + points[:-1]) / 2 * widths).sum() / widths.sum())
    steps = zip((0.0, *STEPS), points.tolist(), strict=True)
    return {"": area} | {f"{step:g}": point for step, point in steps}


METRICS = (
    Metric(
        "comprehensiveness",
        "fall of the probability when the highest units are removed (DeYoung et al., 2020); higher is better",
        mean_drop,
        without_tops,
        CLASSIFIER,
    ),
    Metric(
        "sufficiency",
        "fall of the probability when the highest units alone stay (DeYoung et al., 2020); lower is better",
        mean_drop,
        only_tops,
        CLASSIFIER,
    ),
    Metric(
        "log-odds",
        "log of the probability's ratio when the highest units are removed (Shrikumar et al., 2017); lower "
        "is better",
        log_odds,
        without_tops,
        CLASSIFIER,
    ),
    Metric(
        "decision-flips",
        "share of the fractions whose removal changes the predicted class (after Serrano and Smith, 2019); "
        "higher is better",
        flips,
        without_tops,
        CLASSIFIER | {"classes"},
    ),
    Metric(
        "positive-perturbation",
        "area under the probability while the highest units are removed first (Chefer et al., 2021); lower "
        "is better",
        curve,
        steps_down(lowest=False),
        CLASSIFIER,
    ),
    Metric(
        "negative-perturbation",
        "area under the probability while the lowest units are removed first (Chefer et al., 2021); higher "
        "is better",
        curve,
        steps_down(lowest=True),
        CLASSIFIER,
    ),
)

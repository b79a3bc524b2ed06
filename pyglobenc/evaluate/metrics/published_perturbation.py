"""Perturbation of images as in the published script of Chefer et al., 2021: the accuracy of what is left."""

from __future__ import annotations

from math import floor

import numpy as np

from pyglobenc.evaluate.examples import Example, Metric, Scores, Settings
from pyglobenc.evaluate.metrics.perturbation import STEPS, Queries

NEEDS = frozenset({"classes", "labels"})


def without_floor(lowest: bool) -> Queries:
    """Return the queries of a curve: the highest or lowest pixels are removed, their number rounded down."""

    def queries(example: Example, scores: Scores, settings: Settings) -> list[np.ndarray]:
        order, copies = scores.order[::-1] if lowest else scores.order, []
        for step in STEPS:
            stays = np.ones(len(order), dtype=bool)
            # A product such as 0.7 * 10 may lie below the whole number that it stands for.
            stays[order[: floor(round(step * len(order), 9))]] = False
            copies.append(stays)
        return copies

    return queries


def area(steps: np.ndarray, points: np.ndarray) -> float:
    """Return the area under a curve by the trapezoidal rule, divided by its width."""
    widths = np.diff(steps)
    return float(((points[1:] + points[:-1]) / 2 * widths).sum() / widths.sum())


def accuracy_curve(
    example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Return whether the label is predicted at each step (0 or 1), their mean at "", and two areas.

    The mean is that of the steps 0.1 to 0.9. "area" lies under the same steps, and "area-from-0" begins with
    the whole image.
    """
    right = (probabilities.argmax(1) == example.label).astype(np.float64)
    whole = float(example.probabilities.argmax() == example.label)
    steps, points = np.array((0.0, *STEPS)), np.append(whole, right)
    named = {f"{step:g}": point for step, point in zip(steps, points.tolist(), strict=True)}
    areas = {"area": area(steps[1:], right), "area-from-0": area(steps, points)}
    return {"": float(right.mean())} | areas | named


PUBLISHED = (
    Metric(
        "positive-perturbation",
        "mean accuracy while the highest pixels are removed first (Chefer et al., 2021); lower is better",
        accuracy_curve,
        without_floor(lowest=False),
        NEEDS,
    ),
    Metric(
        "negative-perturbation",
        "mean accuracy while the lowest pixels are removed first (Chefer et al., 2021); higher is better",
        accuracy_curve,
        without_floor(lowest=True),
        NEEDS,
    ),
)

"""Faithfulness: how the probability of the explained class changes when units are removed."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from pyglobenc.evaluate.examples import Example, Metric, Scores, Settings

CLASSIFIER = frozenset({"classifier"})


def count_of(fraction: float, m: int) -> int:
    """Return how many of m units a fraction is: it is rounded up, and at least 1."""
    # A product such as 0.07 * 100 may lie above the whole number that it stands for.
    return max(1, ceil(round(fraction * m, 9)))


def masked_copy(example: Example, stays: np.ndarray, settings: Settings) -> dict[str, list[int]]:
    """Return the model's inputs of a text without some of its units.

    Args:
        example: the text.
        stays: (m,) bool, True for units that stay.
        settings: "mask" replaces the tokens by the mask token. "delete" takes them out, so that later tokens
            move up. "pad" hides them through the attention mask, and the other tokens keep their positions.

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
    if settings.remove == "pad":
        return example.inputs | {"attention_mask": [int(here) for here in present]}
    ids = example.inputs["input_ids"]
    return example.inputs | {
        "input_ids": [value if here else settings.mask_id for value, here in zip(ids, present, strict=True)]
    }


def tops(scores: Scores, fractions: Sequence[float]) -> list[np.ndarray]:
    """Return, for each fraction, (m,) bool with True for the highest units."""
    m, found = len(scores.order), []
    for fraction in fractions:
        top = np.zeros(m, dtype=bool)
        top[scores.order[: count_of(fraction, m)]] = True
        found.append(top)
    return found


def without_tops(example: Example, scores: Scores, settings: Settings) -> list[np.ndarray]:
    """Return the copies without the highest units, one for each fraction."""
    return [~top for top in tops(scores, settings.fractions)]


def only_tops(example: Example, scores: Scores, settings: Settings) -> list[np.ndarray]:
    """Return the copies with the highest units alone, one for each fraction."""
    return tops(scores, settings.fractions)


def mean_drop(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> float:
    """Return by how much the explained class's probability falls, as a mean over the copies."""
    return float(np.mean(example.probabilities[example.target] - probabilities[:, example.target]))


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
)

"""Metrics of language models: how the prompt's tokens bear on the log-probability of an answer.

The definitions follow those of FlashTrace (Pan et al., 2026), which takes RISE from Petsiuk et al. (BMVC
2018) and MAS from Walker et al. (IJCAI 2024).
"""

from __future__ import annotations

import numpy as np

from pyglobenc.evaluate.examples import Example, Metric, Scores, Settings, ranked
from pyglobenc.evaluate.metrics.perturbation import count_of

NEEDS = frozenset({"decoder"})
# A prompt's units are removed in this many steps, or one by one if there are fewer.
STEPS = 20
# A needle is looked for among this fraction of the units.
TOP = 0.1


def groups(scores: Scores) -> list[np.ndarray]:
    """Return the units (m,) from the highest to the lowest in STEPS groups, the first ones larger by 1."""
    return np.array_split(scores.order, min(STEPS, len(scores.order)))


def step_by_step(example: Example, scores: Scores, settings: Settings) -> list[np.ndarray]:
    """Return the whole prompt, and the copies without the first group, the first two groups and so on."""
    stays = np.ones(len(scores.order), dtype=bool)
    copies = [stays.copy()]
    for group in groups(scores):
        stays[group] = False
        copies.append(stays.copy())
    return copies


def response(values: np.ndarray) -> np.ndarray:
    """Return how much of an answer's log-probability is left after each step.

    Args:
        values: (steps + 1,) log-probabilities, of the whole prompt first and without all units last.

    Returns:
        (steps + 1,) from 1 for the whole prompt to 0, never rising. All are NaN if the answer doesn't become
        less probable without all units.
    """
    fall = values[0] - values[-1]
    if not fall > 0:
        return np.full(len(values), np.nan)
    return np.minimum.accumulate(((values - values[-1]) / fall).clip(0, 1))


def share_left(scores: Scores) -> np.ndarray:
    """Return the share of the scores' sum that is left after each step, (steps + 1,) from 1 to 0.

    It falls evenly if the sum isn't positive, as FlashTrace has it.
    """
    sums = np.array([scores.units[group].sum() for group in groups(scores)])
    if not sums.sum() > 0:
        return np.linspace(1, 0, len(sums) + 1)
    return 1 - np.append(0, np.cumsum(sums) / sums.sum())


def magnitude_aligned(left: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return the response plus its distance from the scores' share, limited to [0, 1] and stretched to it."""
    aligned = (left + abs(left - share)).clip(0, 1)
    low, high = aligned.min(), aligned.max()
    return (aligned - low) / (high - low)


def area(curve: np.ndarray) -> float:
    """Return the area under a curve over equal steps, with a total width of 1, by the trapezoidal rule."""
    return float((curve[1:] + curve[:-1]).mean() / 2)


def rise(example: Example, scores: Scores, logarithms: np.ndarray, settings: Settings) -> dict[str, float]:
    """Return the area under the response at "", and the response at each step."""
    return _with_steps(response(logarithms[:, 0]))


def mas(example: Example, scores: Scores, logarithms: np.ndarray, settings: Settings) -> dict[str, float]:
    """Return the area under the magnitude-aligned response at "", and the curve at each step."""
    return _with_steps(magnitude_aligned(response(logarithms[:, 0]), share_left(scores)))


def _with_steps(curve: np.ndarray) -> dict[str, float]:
    """Return the area under a curve, and its values at the fractions of STEPS steps, interpolated."""
    fractions = np.arange(STEPS + 1) / STEPS
    values = np.interp(fractions, np.linspace(0, 1, len(curve)), curve)
    return {"": area(curve)} | {f"{at:g}": float(value) for at, value in zip(fractions, values, strict=True)}


def recovery(
    example: Example, scores: Scores, logarithms: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Return the share of a needle's units that are among the highest TOP at "", and at each fraction.

    Negative scores count as 0, and equal scores are in random order.
    """
    fractions = (TOP, *settings.fractions)
    names = ("", *(f"{fraction:g}" for fraction in settings.fractions))
    if example.needle is None or not example.needle.any():
        return dict.fromkeys(names, np.nan)
    order = ranked(scores.units.clip(min=0), (settings.seed, example.index))
    found = [example.needle[order[: count_of(fraction, len(order))]].sum() for fraction in fractions]
    return {name: float(hits / example.needle.sum()) for name, hits in zip(names, found, strict=True)}


METRICS = (
    Metric(
        "rise",
        "area under the answer's log-probability while the highest units are removed (Petsiuk et al., 2018); "
        "lower is better",
        rise,
        step_by_step,
        NEEDS,
    ),
    Metric(
        "mas",
        "RISE with a penalty where the scores' sizes differ from the fall (Walker et al., 2024); lower is "
        "better",
        mas,
        step_by_step,
        NEEDS,
    ),
    Metric(
        "recovery",
        "share of a known needle among the highest 10 % of the units (Pan et al., 2026); higher is better",
        recovery,
        needs=frozenset({"needles"}),
    ),
)

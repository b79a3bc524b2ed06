"""Segmentation: the pixels whose score is above the mean, compared with an image's true mask."""

from __future__ import annotations

import numpy as np

from pyglobenc.evaluate.examples import Example, Metric, Scores, Settings

MASKS = frozenset({"masks"})
# The value of pixels of a mask that don't count.
IGNORED = -1
# The quotients that a data set's accuracy and intersection over union are the mean of: rows with the sums of
# pixels that are divided, all images together.
ACCURACY = (("right", "pixels"),)
CLASSES = ("background", "foreground")
IOU = tuple((f"{name}.intersection", f"{name}.union") for name in CLASSES)


def overlap(found: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Count the pixels of a segmentation and of the true one.

    Args:
        found: bool, of any shape.
        mask: of the same shape: 0 for background, 1 for foreground, IGNORED for pixels that don't count.

    Returns:
        (3, 2) float64: the pixels that are right, and all pixels; and for background and foreground the
        intersection and the union.
    """
    counted = mask != IGNORED
    found, true = found[counted], mask[counted] == 1
    pairs = [((found == true).sum(), len(true))]
    for given, exact in ((~found, ~true), (found, true)):
        pairs.append(((given & exact).sum(), (given | exact).sum()))
    return np.array(pairs, dtype=np.float64)


def average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    """Return the average precision of a ranking: the sum of precision * (step of recall) over thresholds.

    Args:
        scores: (N,). Equal scores share a threshold.
        true: (N,) bool.

    Returns:
        A number in [0, 1], or NaN if nothing is true.

    Source: average_precision_score of scikit-learn.
    """
    if not true.any():
        return np.nan
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(true[order])
    # The last place of each score.
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    steps = np.diff(hits[ends], prepend=0)
    return float((steps * hits[ends] / (ends + 1)).sum() / hits[-1])


def pixel_scores(example: Example, scores: Scores) -> np.ndarray:
    """Return the scores of an image's pixels, (height, width), scaled to [0, 1]; 0 if all are equal."""
    from pyglobenc.viz.image import to_unit

    return to_unit(scores.units.reshape(example.mask.shape))


def counts(example: Example, scores: Scores) -> np.ndarray:
    """Return the counts of `overlap` for the pixels whose score is above the mean of the image."""
    shown = pixel_scores(example, scores)
    return overlap(shown > shown.mean(), example.mask)


def quotient(pair: np.ndarray) -> float:
    """Return the first number of a pair (2,) divided by the second one; NaN if that is 0."""
    return float(pair[0] / pair[1]) if pair[1] else np.nan


def pixel_accuracy(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> float:
    """Return the share of the pixels that are segmented right."""
    return quotient(counts(example, scores)[0])


def mean_iou(
    example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Return the intersection over union of background and foreground, and their mean at "".

    A class that neither the mask nor the segmentation has is left out.
    """
    own = dict(zip(CLASSES, map(quotient, counts(example, scores)[1:]), strict=True))
    known = [value for value in own.values() if not np.isnan(value)]
    return {"": float(np.mean(known)) if known else np.nan} | own


def mean_ap(example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings) -> float:
    """Return the average precision of the scores R and 1 - R, of foreground and background, in one ranking.

    Source: get_ap_scores of the code of Chefer et al., 2021.
    """
    counted = example.mask != IGNORED
    high, true = pixel_scores(example, scores)[counted], example.mask[counted] == 1
    return average_precision(np.concatenate([1 - high, high]), np.concatenate([~true, true]))


def accuracy_counts(
    example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Return the accuracy at "", and the counts that ACCURACY names."""
    right, pixels = pair = counts(example, scores)[0]
    return {"": quotient(pair), "right": right, "pixels": pixels}


def iou_counts(
    example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Return the image's mean intersection over union at "", and the counts that IOU names."""
    pairs = zip(IOU, counts(example, scores)[1:].tolist(), strict=True)
    named = {name: value for names, pair in pairs for name, value in zip(names, pair, strict=True)}
    return {"": mean_iou(example, scores, probabilities, settings)[""]} | named


ABOVE_THE_MEAN = "of the pixels whose score is above the image's mean (Chefer et al., 2021)"
MAP = Metric(
    "map",
    "average precision of the pixels' scores, for object and background (Chefer et al., 2021)",
    mean_ap,
    needs=MASKS,
)
METRICS = (
    Metric("pixel-accuracy", f"share of right pixels, {ABOVE_THE_MEAN}", pixel_accuracy, needs=MASKS),
    Metric("miou", f"mean intersection over union, {ABOVE_THE_MEAN}", mean_iou, needs=MASKS),
    MAP,
)
# The same with the counts of all images together, as the published script has them.
PUBLISHED = (
    Metric(
        "pixel-accuracy",
        f"share of right pixels of all images, {ABOVE_THE_MEAN}",
        accuracy_counts,
        needs=MASKS,
        ratios=ACCURACY,
    ),
    Metric(
        "miou",
        f"mean intersection over union, all images counted together, {ABOVE_THE_MEAN}",
        iou_counts,
        needs=MASKS,
        ratios=IOU,
    ),
    MAP,
)

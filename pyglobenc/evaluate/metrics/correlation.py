"""Rank correlation of a method's scores with gradients of the explained logit, as in GlobEnc's table."""

from __future__ import annotations

import numpy as np

from pyglobenc.common.rank_correlation import rank_correlation
from pyglobenc.evaluate.examples import KEPT, Example, Metric, Scores, Settings

# The references, and the names of their rows. The first one is the saliency of GlobEnc's published scripts.
REFERENCES = {"gradient-x-input-norm": "", "saliency": "gradient"}


def correlations(
    example: Example, scores: Scores, probabilities: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Return Spearman's correlations with each reference, over all tokens and over those that are ranked.

    A constant row of scores gives NaN.
    """
    out, ranked = {}, example.units != KEPT
    for reference, key in REFERENCES.items():
        other = scores.references.get(reference)
        for inside, suffix in ((slice(None), ""), (ranked, "content")):
            name = "-".join(filter(None, (key, suffix)))
            out[name] = (
                np.nan if other is None else rank_correlation(scores.tokens[inside], other.tokens[inside])
            )
    return out


METRICS = (
    Metric(
        "correlation",
        "Spearman's correlation with the norm of gradient x input (Modarressi et al., 2022)",
        correlations,
        needs=frozenset({"classes"}),
        references=tuple(REFERENCES),
        single=True,
    ),
)

"""Spearman's rank correlation of rows of scores, and of every layer's matrix with a reference."""

import numpy as np


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's correlation of two rows of numbers (m,), with average ranks for equal ones.

    It is NaN if a row is constant.
    """
    # Importing scipy takes long, and the package imports this module.
    from scipy.stats import rankdata

    ranks = [rankdata(row) - (len(row) + 1) / 2 for row in (one, other)]
    size = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float(ranks[0] @ ranks[1] / size) if size else float("nan")


def correlate_rows(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the rank correlation of each row with a reference, or with its own row of the reference.

    Args:
        rows: (..., m).
        reference: (m,), or the shape of rows.

    Returns:
        (...), NaN where a row is constant.
    """
    reference = np.broadcast_to(reference, rows.shape)
    out = np.empty(rows.shape[:-1])
    for index in np.ndindex(out.shape):
        out[index] = rank_correlation(rows[index], reference[index])
    return out

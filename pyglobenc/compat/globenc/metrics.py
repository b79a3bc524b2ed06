"""Rank correlation of attributions with saliencies that were saved before."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr
from tqdm.auto import tqdm


def compute_spearman_correlation(
    attentions_list: Sequence[np.ndarray],
    saliency_file_address: str,
    desc: str = "",
    aggregation: str = "CLS",
    max_length: int = 512,
) -> list[np.ndarray]:
    """Spearman correlation of every layer's attribution with an example's saliency.

    Args:
        attentions_list: (L, n, n) or (n, n) of each example.
        saliency_file_address: file of numpy, (examples, at least n).
        desc: shown beside the progress bar.
        aggregation: "CLS", the first row; "SUM", the sum of all rows.
        max_length: tokens compared at most.

    Returns:
        (L,) of each example.

    Raises:
        ValueError: another aggregation.
    """
    if aggregation not in ("CLS", "SUM"):
        raise ValueError(f"compute_spearman_correlation: aggregation must be CLS or SUM, got {aggregation!r}")
    saliencies = np.load(saliency_file_address)
    out = []
    for index, layers in enumerate(tqdm(_with_layers(attentions_list), desc=desc)):
        length = min(layers.shape[1], max_length)
        rows = layers[:, 0] if aggregation == "CLS" else layers.sum(axis=1)
        out.append(
            np.array([spearmanr(row[:length], saliencies[index][:length]).correlation for row in rows])
        )
    return out


def compute_spearman_correlation_hta(
    attentions_list: Sequence[np.ndarray], hta_file_address: str, desc: str = "", max_length: int = 512
) -> list[np.ndarray]:
    """Spearman correlation of every row of every layer with hidden token attribution.

    Args:
        attentions_list: (L, n, n) or (n, n) of each example.
        hta_file_address: file of numpy, (L, examples, at least n, at least n).
        desc, max_length: as for `compute_spearman_correlation`.

    Returns:
        (L, n) of each example.
    """
    hta = np.load(hta_file_address)
    out = []
    for index, layers in enumerate(tqdm(_with_layers(attentions_list), desc=desc)):
        length = min(layers.shape[1], max_length)
        exact = hta[: len(layers), index, :length, :length]
        pairs = zip(layers[:, :length, :length], exact, strict=True)
        out.append(
            np.array([[spearmanr(a, b).correlation for a, b in zip(*layer, strict=True)] for layer in pairs])
        )
    return out


def _with_layers(matrices: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [m[None] if m.ndim == 2 else m for m in matrices]

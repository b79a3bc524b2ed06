"""Rank correlation of attributions with saliencies that are stored in a file."""

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm

from pyglobenc.common.rank_correlation import correlate_rows


def compute_spearman_correlation(
    attentions_list: Sequence[np.ndarray],
    saliency_file_address: str,
    desc: str = "",
    aggregation: str = "CLS",
    max_length: int = 512,
) -> list[np.ndarray]:
    """Compute the Spearman correlation of each layer's attribution with the saliency of the example.

    Args:
        attentions_list: one array (L, n, n) or (n, n) for each example.
        saliency_file_address: path of a numpy file with an array (examples, m), m at least n.
        desc: text shown beside the progress bar.
        aggregation: "CLS" takes the first row of each matrix, and "SUM" the sum of all rows.
        max_length: the largest number of tokens that are compared.

    Returns:
        One array (L,) for each example.

    Raises:
        ValueError: the aggregation is unknown.
    """
    if aggregation not in ("CLS", "SUM"):
        raise ValueError(f"compute_spearman_correlation: aggregation must be CLS or SUM, got {aggregation!r}")
    saliencies = np.load(saliency_file_address)
    out = []
    for index, layers in enumerate(tqdm(_with_layers(attentions_list), desc=desc)):
        length = min(layers.shape[1], max_length)
        rows = layers[:, 0] if aggregation == "CLS" else layers.sum(axis=1)
        out.append(correlate_rows(rows[:, :length], saliencies[index][:length]))
    return out


def compute_spearman_correlation_hta(
    attentions_list: Sequence[np.ndarray], hta_file_address: str, desc: str = "", max_length: int = 512
) -> list[np.ndarray]:
    """Compute the Spearman correlation of each row of each layer with hidden token attribution.

    Args:
        attentions_list: one array (L, n, n) or (n, n) for each example.
        hta_file_address: path of a numpy file with an array (L, examples, m, m), m at least n.
        desc, max_length: as for `compute_spearman_correlation`.

    Returns:
        One array (L, n) for each example.
    """
    hta = np.load(hta_file_address)
    out = []
    for index, layers in enumerate(tqdm(_with_layers(attentions_list), desc=desc)):
        length = min(layers.shape[1], max_length)
        exact = hta[: len(layers), index, :length, :length]
        out.append(correlate_rows(layers[:, :length, :length], exact))
    return out


def _with_layers(matrices: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [m[None] if m.ndim == 2 else m for m in matrices]

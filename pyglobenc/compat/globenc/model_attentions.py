"""Attentions and norms of a data set as numpy arrays, and the baselines that mix them with residuals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

# Positions among the nine norms: the stages N, N_Res, N_ResLN and N_Enc, and their mixing ratios.
STAGES = range(1, 5)
RATIOS = range(5, 9)


def extract_attentions(
    model: nn.Module,
    encoder_func: Callable[[int], Any],
    dataset_len: int,
    device: str | torch.device = "cpu",
    delete_sep: bool = False,
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Compute the attentions and norms of all examples.

    Args:
        model: a `BertForSequenceClassification` or `ElectraForSequenceClassification` of this package. It is
            moved to the device.
        encoder_func: function that maps the number of an example to the output of the tokenizer, for a batch
            of 1.
        dataset_len: number of examples.
        device: a torch device.
        delete_sep: leave out the last token, except in the norms of single heads.

    Returns:
        The attention averaged over heads, one array (L, n, n) for each example. Then nine lists over the
        examples: the norms of single heads (L, H, n, n), four maps (L, n, n), and four mixing ratios (L, n).
    """
    raw_attentions, norms_list = [], [[] for _ in range(9)]
    model.to(device)
    model.eval()
    for index in tqdm(range(dataset_len)):
        encoded = encoder_func(index).to(device)
        with torch.no_grad():
            _, attentions, norms = model(
                **encoded, output_attentions=True, output_norms=True, return_dict=False
            )[:3]
        last = attentions[0].shape[-1] - bool(delete_sep)
        for kind, found in enumerate(norms_list):
            norm = torch.stack([layer[kind][0] for layer in norms]).cpu().numpy()
            if kind in STAGES:
                norm = norm[:, :last, :last]
            elif kind in RATIOS:
                norm = norm[:, :last]
            found.append(norm)
        raw_attentions.append(
            torch.stack([layer[0].mean(0) for layer in attentions]).cpu().numpy()[:, :last, :last]
        )
    return raw_attentions, norms_list


def build_ratio_residual_attentions(
    raw_attentions_list: Sequence[np.ndarray], norms_list: Sequence[Sequence[np.ndarray]]
) -> Mapping[str, list[np.ndarray]]:
    """Mix attention and norms with a residual.

    Args:
        raw_attentions_list, norms_list: the two results of `extract_attentions`.

    Returns:
        By name, one float64 array (L, n, n) for each example. "W-FixedRes" and "N-FixedRes" are attention and
        norms with a residual of one half. "W-Res" uses the mixing ratio of N_Enc, after the diagonal of the
        attention is removed and its rows are scaled to sum 1.
    """
    out: dict[str, list[np.ndarray]] = {"W-FixedRes": [], "W-Res": [], "N-FixedRes": []}
    for attention, norms, ratio in tqdm(
        list(zip(raw_attentions_list, norms_list[1], norms_list[8], strict=True))
    ):
        attention, norms, half = (
            attention.astype(np.float64),
            norms.astype(np.float64),
            np.full(ratio.shape, 0.5),
        )
        out["W-FixedRes"].append(_with_residual(attention, half))
        out["N-FixedRes"].append(_with_residual(norms / norms.sum(2, keepdims=True), half))
        others = attention * (1 - np.eye(attention.shape[1]))
        out["W-Res"].append(_with_residual(others / others.sum(2, keepdims=True), ratio))
    return out


def _with_residual(matrices: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Return ratio (L, n) times the rows of the matrices (L, n, n), plus 1 - ratio on the diagonal."""
    out = matrices * ratio[..., None]
    diagonal = np.arange(matrices.shape[1])
    out[:, diagonal, diagonal] += 1 - ratio
    return out

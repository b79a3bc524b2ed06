"""Attentions and norms of a data set, and the baselines that mix them with residuals, as numpy arrays."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

STAGES = range(1, 5)  # N, N_Res, N_ResLN, N_Enc among the nine norms
RATIOS = range(5, 9)


def extract_attentions(
    model: nn.Module,
    encoder_func: Callable[[int], Any],
    dataset_len: int,
    device: str | torch.device = "cpu",
    delete_sep: bool = False,
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Attentions and norms of every example.

    Args:
        model: a `BertForSequenceClassification` or `ElectraForSequenceClassification` of this package; moved
            to the device.
        encoder_func: of an example's number, its tokens as the tokenizer returns them, a batch of 1.
        dataset_len: number of examples.
        device: as torch names it.
        delete_sep: leave out the last token, but for the norms of single heads.

    Returns:
        Attention averaged over heads, (L, n, n) of each example; and for each of the nine norms a list over
        examples: per head (L, H, n, n), four maps (L, n, n), four mixing ratios (L, n).
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
    """Attention and norms with a residual, of what `extract_attentions` returned.

    Returns:
        float64 (L, n, n) of each example, by name: W-FixedRes and N-FixedRes (a residual of one half), W-Res
            (the mixing ratio of
        N_Enc; the attention's own diagonal is left out and the rest sums to 1).
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
    """ratio times the matrices (L, n, n), plus 1 - ratio on the diagonal; ratio (L, n)."""
    out = matrices * ratio[..., None]
    diagonal = np.arange(matrices.shape[1])
    out[:, diagonal, diagonal] += 1 - ratio
    return out

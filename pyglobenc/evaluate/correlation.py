"""Rank correlation of every layer's rollout with saliency: the tables and curves of the GlobEnc paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.rank_correlation import correlate_rows
from pyglobenc.inputs.pipelines import takes_pipelines
from pyglobenc.inputs.windows import Encoded, Text, encode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The rows of the paper's table, best first, and the methods that compute them.
TABLE = {
    "N_Enc": "globenc",
    "N_Res": "n-res",
    "N-FixedRes": "n-fixedres",
    "N": "n",
    "W-Res": "w-res",
    "W": "w",
    "N_ResLN": "n-resln",
    "W-FixedRes": "attention-rollout",
}
SALIENCIES = ("gradient-x-input-norm", "gradient-x-input", "saliency")
MODES = ("row", "sum", "hta")
# Texts of one length share a batch, so there is no padding.
BATCH = 32


@dataclass(frozen=True)
class LayerCorrelations:
    """Correlations of one method.

    Attributes:
        rollout: (texts, L), or (texts, L, n) with mode="hta", where n is the length of the longest text:
            correlation of the rollout up to each layer. NaN where the scores are constant, or behind a text.
        layers: the same shape: correlation of each layer alone.
    """

    rollout: np.ndarray
    layers: np.ndarray

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each layer, the last one first: layer, of, mean, sd, n and skipped.

        `of` is "rollout" or "layer". A text counts with the mean over its attenders. Texts whose scores are
        constant are skipped.
        """
        out = []
        for of, values in (("rollout", self.rollout), ("layer", self.layers)):
            for layer in range(values.shape[1], 0, -1):
                column = values[:, layer - 1]
                if column.ndim == 2:
                    counted = ~np.isnan(column)
                    column = np.divide(
                        np.nansum(column, 1),
                        counted.sum(1),
                        out=np.full(len(column), np.nan),
                        where=counted.any(1),
                    )
                column = column[~np.isnan(column)]
                mean, sd = (column.mean(), column.std()) if len(column) else (np.nan, np.nan)
                out.append(
                    {"layer": layer, "of": of, "mean": float(mean), "sd": float(sd)}
                    | {"n": len(column), "skipped": len(values) - len(column)}
                )
        return out


def read_saliencies(path: str | Path) -> np.ndarray:
    """Read saliencies in the published form: a .npy file (examples, max_length), with 0 behind each text.

    Raises:
        ValueError: the file holds something else.
        OSError: the file can't be read.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"read_saliencies: {path} is no .npy file of numbers: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
        came = getattr(found, "shape", type(found).__name__)
        raise ValueError(f"read_saliencies: {path} must hold numbers (examples, max_length), got {came}")
    if not np.isfinite(found).all():
        raise ValueError(f"read_saliencies: {path} holds NaN or infinity")
    return found


@takes_pipelines
@known_arguments
def layer_correlations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    methods: Sequence[str] = tuple(TABLE.values()),
    saliency: str | np.ndarray = "gradient-x-input-norm",
    mode: str = "row",
    content: bool = False,
    max_length: int | None = 64,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, LayerCorrelations]:
    """Correlate the rollout up to each layer, and each layer alone, with saliency.

    With the defaults this is the protocol of GlobEnc's published scripts for SST-2: Spearman's correlation,
    with average ranks for equal scores, of row 0 ([CLS]) with |dy/dh0 * h0|_2 of the predicted class's logit
    y. [CLS] and [SEP] count, and texts are cut at 64 tokens (128 for MNLI, 72 for HateXplain).

    Args:
        model, tokenizer, texts: as for `pyglobenc.explain`. The model needs a classifier, unless saliency is
            an array.
        methods: names in `pyglobenc.methods.rollout.baselines.ROLLOUTS`, except attention-flow.
        saliency: a method of `GradientAttribution` in SALIENCIES; or an array (texts, m) as `read_saliencies`
            returns it; with mode="hta" an array (L, texts, m, m).
        mode: "row" takes row 0 of each matrix, "sum" the sum of its rows. "hta" correlates every row of every
            layer with hidden token attribution, which must be given.
        content: leave special tokens out.
        max_length: longer texts are cut; None for the model's limit.
        backend, dtype: as for `GlobEnc`. The gradients are computed in float64 where dtype says so.
        progress: show a progress bar.

    Returns:
        LayerCorrelations of each method by name.

    Raises:
        TypeError, ValueError: a text is empty, a method is unknown or refuses the model, or the saliency
            doesn't fit the texts.
    """
    # These imports take seconds.
    from tqdm import tqdm

    from pyglobenc.explain import check_texts
    from pyglobenc.hf.unwrap import stock_model
    from pyglobenc.inputs.batches import longest
    from pyglobenc.methods.gradients.attribution import GradientAttribution
    from pyglobenc.methods.rollout.baselines import Rollout

    _check_choices(methods, saliency, mode)
    given, names = isinstance(saliency, np.ndarray), check_texts(texts)
    limit = longest(stock_model(model), tokenizer, max_length)
    encoded = [
        encode(tokenizer, text, name, limit, "truncate") for text, name in zip(texts, names, strict=True)
    ]
    gradients = None if given else GradientAttribution(model, saliency, dtype)
    rollouts = {name: Rollout(model, name, backend, dtype) for name in methods}
    if given:
        _check_saliency(saliency, encoded, mode)
    found: dict[str, dict[str, list[Any]]] = {
        name: {"rollout": [None] * len(encoded), "layers": [None] * len(encoded)} for name in methods
    }
    with tqdm(total=len(encoded) * len(methods), desc="correlate", unit="text", disable=not progress) as bar:
        for numbers, batch in _batches(model, encoded):
            rows = None if given else gradients(**batch).scores.double().cpu().numpy()
            for name, attribute in rollouts.items():
                maps = attribute(**batch, maps=["layers"]).maps["layers"].double().cpu().numpy()
                for place, number in enumerate(numbers):
                    inside = ~np.array(encoded[number].special) if content else slice(None)
                    n = maps.shape[-1]
                    reference = rows[place] if not given else _reference(saliency, number, n, mode)
                    for of, matrices in (("layers", maps[place]), ("rollout", _rolled_out(maps[place]))):
                        found[name][of][number] = _correlate(matrices, reference, mode, inside)
                bar.update(len(numbers))
    return {
        name: LayerCorrelations(**{of: _stacked(some) for of, some in one.items()})
        for name, one in found.items()
    }


def _check_choices(methods: Sequence[str], saliency: str | np.ndarray, mode: str) -> None:
    from pyglobenc.methods.rollout.baselines import ROLLOUTS

    known = [name for name in ROLLOUTS if name != "attention-flow"]
    for name in methods:
        if name not in known:
            raise ValueError(f"layer_correlations: methods must be of {', '.join(known)}, got {name!r}")
    if mode not in MODES:
        raise ValueError(f"layer_correlations: mode must be one of {', '.join(MODES)}, got {mode!r}")
    given = isinstance(saliency, np.ndarray)
    if not given and saliency not in SALIENCIES:
        raise ValueError(
            f"layer_correlations: saliency must be an array or of {', '.join(SALIENCIES)}, got {saliency!r}"
        )
    if mode == "hta" and not given:
        raise ValueError("layer_correlations: mode='hta' needs saliency as an array (L, texts, m, m)")


def _rolled_out(layers: np.ndarray) -> np.ndarray:
    """Return the products N_l ... N_1 of matrices (L, n, n), each divided by its largest entry."""
    out = [layers[0]]
    for matrix in layers[1:]:
        product = matrix @ out[-1]
        # Otherwise the product of many layers could overflow. The scale doesn't change ranks.
        out.append(product / product.max())
    return np.stack(out)


def _correlate(matrices: np.ndarray, reference: np.ndarray, mode: str, inside: Any) -> np.ndarray:
    """Return the correlations of matrices (L, n, n) with a reference: (L,), or (L, n) with mode="hta"."""
    rows = {"row": lambda: matrices[:, 0], "sum": lambda: matrices.sum(1), "hta": lambda: matrices}[mode]()
    return correlate_rows(rows[..., inside], reference[..., inside])


def _reference(saliency: np.ndarray, number: int, n: int, mode: str) -> np.ndarray:
    return saliency[:, number, :n, :n] if mode == "hta" else saliency[number, :n]


def _check_saliency(saliency: np.ndarray, encoded: Sequence[Encoded], mode: str) -> None:
    axes, texts = (4, 1) if mode == "hta" else (2, 0)
    shape = "(L, texts, m, m)" if mode == "hta" else "(texts, m)"
    if saliency.ndim != axes or saliency.shape[texts] != len(encoded):
        raise ValueError(
            f"layer_correlations: saliency must be {shape} with {len(encoded)} texts, got {saliency.shape}"
        )
    for number, text in enumerate(encoded):
        n = len(text.tokens)
        behind = saliency[:, number, :, n:] if mode == "hta" else saliency[number, n:]
        if n > saliency.shape[-1] or behind.any():
            held = int(np.flatnonzero(saliency[number]).max(initial=-1)) + 1 if mode != "hta" else None
            came = f"{saliency.shape[-1]} entries" if held is None else f"{held} entries that aren't 0"
            raise ValueError(
                f"layer_correlations: text {number + 1} has {n} tokens, but its saliency has {came}; are the "
                "texts, the tokenizer and max_length those of the file?"
            )


def _batches(
    model: PreTrainedModel, encoded: Sequence[Encoded]
) -> Iterator[tuple[list[int], Mapping[str, torch.Tensor]]]:
    """Yield the numbers and the model's inputs (B, n) of texts of one length."""
    import torch

    from pyglobenc.hf.unwrap import called_module, stock_model
    from pyglobenc.methods.arguments import accepts

    called, device = called_module(model), stock_model(model).device
    lengths: dict[int, list[int]] = {}
    for number, text in enumerate(encoded):
        lengths.setdefault(len(text.tokens), []).append(number)
    for _, numbers in sorted(lengths.items()):
        for start in range(0, len(numbers), BATCH):
            part = numbers[start : start + BATCH]
            names = [name for name in encoded[part[0]].inputs if accepts(called, name)]
            yield (
                part,
                {
                    name: torch.tensor([encoded[number].inputs[name] for number in part], device=device)
                    for name in names
                },
            )


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays (L,), or (L, n) of several n, as one array with NaN behind the shorter ones."""
    shape = np.max([one.shape for one in arrays], axis=0)
    out = np.full((len(arrays), *shape), np.nan)
    for place, one in zip(out, arrays, strict=True):
        place[tuple(slice(size) for size in one.shape)] = one
    return out

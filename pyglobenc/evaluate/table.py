"""The result of `pyglobenc.evaluate`: a row for each method and metric, and the numbers of every text."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.files import write_file

FORMAT, FORMAT_VERSION = "pyglobenc.evaluation", 1
# The limits of a 95 % interval, in per cent.
LIMITS = (2.5, 97.5)
# So many resampled numbers are in memory at a time.
RESAMPLED = 1 << 22


def average(values: np.ndarray, pairs: bool) -> np.ndarray:
    """Return the mean over texts.

    Args:
        values: (..., n), the numbers of n texts.
        pairs: values are (..., n, K, 2), K pairs of numbers of each text. The result is then the mean over
            the K pairs of (sum over texts of the first number) / (sum over texts of the second one).

    Returns:
        (...).
    """
    if not pairs:
        return values.mean(-1)
    first, second = np.moveaxis(values.sum(-3), -1, 0)
    return (first / second).mean(-1)


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by the percentiles of means over resampled values.

    Args:
        values: (n,) float64, or (n, K, 2) for pairs, as for `average`.
        resamples: number of samples of n values, drawn with replacement.
        seed: makes the interval the same in every call.

    Returns:
        The lower and the upper limit; NaN without values or without resamples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    n = len(values)
    if not n or not resamples:
        return np.nan, np.nan
    generator, means = np.random.default_rng(seed), []
    block = max(1, RESAMPLED // values.size)
    for start in range(0, resamples, block):
        chosen = generator.integers(0, n, (min(block, resamples - start), n))
        means.append(average(values[chosen], values.ndim > 1))
    low, high = np.percentile(np.concatenate(means), LIMITS)
    return float(low), float(high)


class EvaluationTable:
    """The metrics of several methods.

    Attributes:
        rows: list of dicts with method, metric, mean, low, high (95 % bootstrap over texts), n (texts
            that count), seconds_per_text (of the attribution), sd (standard deviation over texts), skipped
            (texts that don't count), ties (texts in which two units have the same score) and zeros (texts
            whose scores are all zero).
        per_text: maps (method, metric) to (texts,) float64, with NaN for texts that don't count.
        notes: sentences on what was left out or replaced.
        info: settings, and the counts and rate of the forward passes.
    """

    def __init__(
        self,
        per_text: Mapping[tuple[str, str], np.ndarray],
        of_method: Mapping[str, Mapping[str, float]],
        bootstrap: int,
        seed: int,
        notes: list[str],
        info: dict[str, Any],
        ratios: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    ):
        self.per_text, self.notes, self.info = dict(per_text), notes, info
        self.rows, ratios = [], ratios or {}
        sums = {f"{metric}.{key}" for metric, pairs in ratios.items() for pair in pairs for key in pair}
        for (method, metric), values in self.per_text.items():
            if metric in sums:
                continue
            counted = values[~np.isnan(values)]
            if metric in ratios:
                keys = [[f"{metric}.{key}" for key in pair] for pair in ratios[metric]]
                pairs = np.moveaxis([[self.per_text[method, key] for key in pair] for pair in keys], -1, 0)
                counted = pairs[~np.isnan(pairs).any((1, 2))]
            mean = float(average(counted, counted.ndim > 1)) if len(counted) else np.nan
            low, high = bootstrap_interval(counted, bootstrap, seed)
            spread = values[~np.isnan(values)].std() if len(counted) else np.nan
            row = {"method": method, "metric": metric, "mean": mean, "low": low, "high": high}
            row |= {"n": len(counted), "seconds_per_text": of_method[method]["seconds_per_text"]}
            self.rows.append(
                row
                | {"sd": float(spread), "skipped": len(values) - len(counted)}
                | {name: value for name, value in of_method[method].items() if name not in row}
            )

    def __repr__(self) -> str:
        methods, metrics = (len({key[i] for key in self.per_text}) for i in (0, 1))
        return f"EvaluationTable({methods} methods, {metrics} metrics)"

    def show(self) -> None:
        """Print a table for each metric, and the notes. Points of curves are left out."""
        from pyglobenc.viz.evaluation import show

        show(self.rows, self.notes)

    @known_arguments
    def to_csv(self, path: str | Path | None = None) -> str:
        """Return the rows as CSV, with numbers to their last digit, and write them to path if given.

        Raises:
            OSError: the file can't be written.
        """
        out = io.StringIO()
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return self._written(path, out.getvalue())

    @known_arguments
    def to_json(self, path: str | Path | None = None) -> str:
        """Return rows, numbers of every text, notes and settings as JSON, and write it to path if given.

        NaN becomes null.

        Raises:
            OSError: the file can't be written.
        """
        per_text = [
            {"method": method, "metric": metric, "values": values.tolist()}
            for (method, metric), values in self.per_text.items()
        ]
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, "rows": self.rows}
        document |= {"per_text": per_text, "notes": self.notes, "info": self.info}
        return self._written(path, json.dumps(_without_nan(document), indent=1, allow_nan=False) + "\n")

    @known_arguments
    def to_png(self, path: str | Path | None = None) -> bytes:
        """Return a PNG chart of all rows, and write it to path if given.

        Raises:
            OSError: the file can't be written.
        """
        from pyglobenc.viz.evaluation import png

        picture = png(self.rows)
        if path is not None:
            write_file(path, picture)
        return picture

    @known_arguments
    def to_html(self, path: str | Path | None = None) -> str:
        """Return an HTML page with the chart, tables, notes and settings, and write it to path if given.

        Raises:
            OSError: the file can't be written.
        """
        from pyglobenc.viz.evaluation import page

        return self._written(path, page(self.rows, self.notes, self.info))

    @staticmethod
    def _written(path: str | Path | None, text: str) -> str:
        if path is not None:
            write_file(path, text.encode())
        return text


def _without_nan(value: Any) -> Any:
    """Return a JSON value with None for every NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value

"""The roofline picture: operations a second against operations a byte, under the measured ceilings."""

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {"reference": "#7f7f7f", "cpu": "#1f77b4", "triton": "#d62728", "cuda": "#2ca02c"}


def roofline(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A matplotlib figure of measured calls.

    Args:
        rows: of `pyglobenc bench`: op, backend, median_s, flops, bytes, and the ceilings gemm_flops and copy_bytes.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    points = [(float(row["flops"]), float(row["bytes"]), float(row["median_s"]), row) for row in rows]
    points = [point for point in points if point[0] > 0]
    gemm, copy = float(rows[0]["gemm_flops"]), float(rows[0]["copy_bytes"])
    intensities = [flops / size for flops, size, _, _ in points] or [1.0]
    left, right = min(*intensities, gemm / copy) / 4, max(*intensities, gemm / copy) * 4
    axes.plot([left, gemm / copy, right], [left * copy, gemm, gemm], color="black", linewidth=1)
    axes.annotate(f"{gemm / 1e9:,.0f} GFLOP/s", (right, gemm), ha="right", va="bottom")
    axes.annotate(f"{copy / 1e9:,.0f} GB/s", (left, left * copy), ha="left", va="bottom")
    for flops, size, seconds, row in points:
        colour = COLOURS.get(row["backend"], "#9467bd")
        axes.plot(flops / size, flops / seconds, "o", color=colour)
        axes.annotate(row["op"], (flops / size, flops / seconds), xytext=(4, 3), textcoords="offset points", fontsize=7, color=colour)
    for name in dict.fromkeys(row["backend"] for *_, row in points):
        axes.plot([], [], "o", color=COLOURS.get(name, "#9467bd"), label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second", title=title)
    axes.legend(loc="lower right")
    return figure

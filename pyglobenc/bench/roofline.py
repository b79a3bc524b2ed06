"""Draws the roofline: operations per second against operations per byte, under the measured ceilings."""

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {"reference": "#7f7f7f", "cpu": "#1f77b4", "triton": "#d62728", "cuda": "#2ca02c"}
# The benchmarks compare the backends with these baselines.
COLOURS |= {"compile": "#8c564b", "materialised": "#ff7f0e", "sdpa": "#e377c2"}
OTHER = "#9467bd"
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def roofline(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Return a matplotlib figure of measured calls.

    Args:
        rows: results of `pyglobenc bench` or of an op's benchmark, with op or n, backend, dtype, median_s,
            flops, bytes, and the ceilings gemm_flops and copy_bytes. Calls without operations aren't drawn.
        title: title of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    drawn = [row for row in rows if float(row["flops"]) > 0]
    points = [
        (float(row["flops"]) / float(row["bytes"]), float(row["flops"]) / float(row["median_s"]), row)
        for row in drawn
    ]
    roofs = {row["dtype"]: (float(row["gemm_flops"]), float(row["copy_bytes"])) for row in rows}
    ridges = [gemm / copy for gemm, copy in roofs.values()]
    intensities = [*ridges, *(x for x, _, _ in points)]
    left, right = min(intensities) / 4, max(intensities) * 4
    for dtype, (gemm, copy) in roofs.items():
        axes.plot([left, gemm / copy, right], [left * copy, gemm, gemm], color="black", linewidth=1)
        axes.annotate(f"{gemm / 1e9:,.0f} GFLOP/s, {dtype}", (right, gemm), ha="right", va="bottom")
        axes.annotate(f"{copy / 1e9:,.0f} GB/s", (left, left * copy), ha="left", va="bottom")
    for x, y, row in points:
        colour = COLOURS.get(row["backend"], OTHER)
        axes.plot(x, y, MARKERS.get(row["dtype"], "o"), color=colour)
        axes.annotate(
            row.get("op") or f"n={row['n']}",
            (x, y),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            color=colour,
        )
    for name in dict.fromkeys(row["backend"] for row in drawn):
        axes.plot([], [], "o", color=COLOURS.get(name, OTHER), label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second", title=title
    )
    axes.legend(loc="lower right")
    return figure

"""Pictures from the CSV files of benchmarks/results: time and memory against n, with the floor, and the
roofline.

    python benchmarks/plot.py                          # every results/*.csv, pictures beside them
    python benchmarks/plot.py results/head_gram.csv --ceilings results/machine.csv --output pictures

A file with several n gives NAME-time.png, and NAME-memory.png where peak memory was measured, a panel for
every dtype and batch; one with ceilings, of `pyglobenc bench` or of an op's suite, gives NAME-roofline.png.
The floor is what counted operations and bytes take at the row's own ceilings, else at those of a file that
`pyglobenc bench --csv` wrote on the same device with as many threads.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pyglobenc.bench.costs import Ceilings, Cost
from pyglobenc.bench.roofline import COLOURS, roofline

RESULTS = Path(__file__).parent / "results"
MACHINE = "machine.csv"
# of a row, what tells one panel from another, and one line from another: names, and these numbers
PANELS = ("dtype", "batch")
PARAMETERS = ("batch", "batch_tokens", "targets", "layers")
MARKERS = "os^vDP*X"
Points = list[tuple[float, float, dict[str, str]]]


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def panels(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows by dtype and batch, where these vary, under the panel's title."""
    varying = [name for name in PANELS if len({row.get(name) for row in rows}) > 1]
    out: dict[str, list] = {}
    for row in rows:
        out.setdefault(", ".join(f"{name} {row[name]}" for name in varying if row.get(name)), []).append(row)
    return out


def lines(rows: list[dict[str, str]], value: str) -> dict[str, Points]:
    """Points (n, value, row) of every line, by its name: what its rows have in common."""
    varying = [
        name
        for name in rows[0]
        if len({row.get(name) for row in rows}) > 1 and (name in PARAMETERS or not all_numbers(rows, name))
    ]
    out: dict[str, Points] = {}
    for row in rows:
        if row.get("n") and row.get(value):
            name = (
                " ".join(row[key] for key in varying if row.get(key))
                or row.get("backend")
                or row.get("benchmark", value)
            )
            out.setdefault(name, []).append((float(row["n"]), float(row[value]), row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in out.items()}


def all_numbers(rows: list[dict[str, str]], name: str) -> bool:
    """Whether a column holds nothing but numbers and gaps."""
    try:
        return bool([float(row[name]) for row in rows if row.get(name)])
    except ValueError:
        return False


def ceilings_for(row: dict[str, str], machine: list[dict[str, str]]) -> Ceilings | None:
    """Ceilings that were measured with a row, or where it was."""
    for found in (row, *machine):
        if (
            found.get("gemm_flops")
            and found["device"] == row.get("device")
            and found["threads"] == row.get("threads")
        ):
            return Ceilings(float(found["gemm_flops"]), float(found["exp_rate"]), float(found["copy_bytes"]))
    return None


def floor_of(points: Points, machine: list[dict[str, str]]) -> list[tuple[float, float]]:
    """(n, seconds) of the counted operations and bytes at the machine's ceilings, where both are known."""
    out = []
    for n, _, row in points:
        ceilings = ceilings_for(row, machine)
        if ceilings is not None and row.get("flops"):
            cost = Cost(*(float(row[name]) for name in ("flops", "exps", "bytes")))
            out.append((n, cost.floor(ceilings, overlap="cores" not in row["device"])))
    return out


def picture(
    rows: list[dict[str, str]], value: str, label: str, machine: list[dict[str, str]], title: str
) -> Figure | None:
    """Log-log panels against n; None if no row has the value."""
    found = {name: lines(part, value) for name, part in panels(rows).items()}
    found = {name: part for name, part in found.items() if part}
    if not found:
        return None
    columns = min(2, len(found))
    down = -(-len(found) // columns)
    figure = Figure(figsize=(8 * columns, 5 * down), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(down, columns, sharex=True, sharey=True, squeeze=False).flat
    # the panels share their axis, ticks included
    ticks = sorted({n for part in found.values() for points in part.values() for n, _, _ in points})
    for axes, (name, part) in zip(grid, found.items(), strict=False):
        panel(axes, part, value, machine)
        axes.set(xscale="log", yscale="log", xlabel="n", ylabel=label, title=name)
        axes.set_xticks(ticks, minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in list(grid):
        axes.remove()
    return figure


def panel(axes: Any, found: dict[str, Points], value: str, machine: list[dict[str, str]]) -> None:
    """Lines of one panel and, under times, the floor."""
    floors: dict[float, float] = {}
    for number, (name, points) in enumerate(found.items()):
        colour = next((COLOURS[backend] for backend in COLOURS if backend in name.split()), None)
        x, marker = [n for n, _, _ in points], MARKERS[number % len(MARKERS)]
        (line,) = axes.plot(x, [y for _, y, _ in points], marker=marker, color=colour, label=name)
        if value == "median_s":
            low, high = ([float(row[q]) for _, _, row in points] for q in ("q1_s", "q3_s"))
            axes.fill_between(x, low, high, alpha=0.15, color=line.get_color())
            for n, seconds in floor_of(points, machine):
                # the op's own, above that of plain attention beside it
                floors[n] = max(seconds, floors.get(n, seconds))
    if floors:
        axes.plot(
            sorted(floors), [floors[n] for n in sorted(floors)], "k--", label="floor by operations and bytes"
        )


def pictures(path: Path, machine: list[dict[str, str]]) -> dict[str, Figure]:
    """Pictures of one CSV file, by what is added to its name."""
    rows = read(path)
    if not rows:
        return {}
    where = f"{rows[0].get('device', '')}, {rows[0].get('threads', '?')} threads"
    title, made = f"{path.stem}: {where}", {}
    if len({row.get("n") for row in rows}) > 1:
        made["time"] = picture(rows, "median_s", "seconds, median and quartiles", machine, title)
        # peak_mib: of a process of its own
        made["memory"] = picture(
            rows, "peak_mib" if "peak_mib" in rows[0] else "peak_mb", "peak MiB", machine, title
        )
    # a batch's operations and bytes grow alike
    single = [row for row in rows if row.get("gemm_flops") and row.get("batch") in (None, "1")]
    if any(float(row["flops"]) > 0 for row in single):
        made["roofline"] = roofline(single, title)
    return {name: figure for name, figure in made.items() if figure is not None}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="CSV files (default: all of benchmarks/results)")
    parser.add_argument(
        "--ceilings",
        type=Path,
        help=f"what pyglobenc bench --csv wrote (default: {MACHINE} beside the first file)",
    )
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: beside each file)")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("*.csv"))
    if not files:
        parser.error(f"there is no CSV file in {RESULTS}")
    ceilings = options.ceilings or files[0].parent / MACHINE
    machine = read(ceilings) if ceilings.exists() else []
    for path in files:
        for name, figure in pictures(path, machine).items():
            to = (options.output or path.parent) / f"{path.stem}-{name}.png"
            to.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(to, dpi=120)
            print(to)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`pyglobenc bench` measures the machine's best rates, and how close the backends of each op come to them."""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from typing import Any

from pyglobenc.cli.options import positive, seconds, threads
from pyglobenc.common.characters import printable

NAME = "bench"
HELP = "measure this machine's best rates, and each op's share of them"
# The memory held at once: float32 numbers for each token, and (n, n) maps. Both were measured at n = 1,024
# and 2,048 and rounded up.
NUMBERS, MAPS = 1 << 15, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.epilog = (
        "The share is the time that an op's operations and bytes need at the machine's best rates, divided "
        "by the measured time. "
        "It exceeds 100% if the op's data stays in a cache, because a cache is faster than the memory that "
        "the copy measures. With --save, backend=auto uses these measurements from then on. They are "
        "written to the path in PYGLOBENC_TABLE, or to the user's "
        "cache folder."
    )
    parser.add_argument(
        "--n", type=positive, default=512, help="number of tokens of a BERT-base layer (default 512)"
    )
    parser.add_argument(
        "--op", action="append", metavar="OP", help="measure only this op; may be given several times"
    )
    parser.add_argument(
        "--seconds", type=seconds, default=0.4, help="time for each measurement (default 0.4)"
    )
    parser.add_argument("--threads", type=threads, help="number of torch's threads (default: all)")
    parser.add_argument("--csv", metavar="FILE", help="write the measurements to a CSV file")
    parser.add_argument("--png", metavar="FILE", help="write the roofline picture to a PNG file")
    parser.add_argument(
        "--save", action="store_true", help="let backend=auto use these measurements from now on"
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def run(options: argparse.Namespace) -> int:
    """Measure the ops, report the results, and return the exit status."""
    import torch
    from tqdm import tqdm

    from pyglobenc.backends.dispatch import INTERPRETED
    from pyglobenc.bench.ceilings import measure_ceilings
    from pyglobenc.bench.op_table import OP_TABLE
    from pyglobenc.common.files import check_writable
    from pyglobenc.inputs.batching import available_bytes

    unknown = [op for op in options.op or () if op not in OP_TABLE]
    if unknown:
        options.error(f"--op: must be one of {', '.join(OP_TABLE)}, got {unknown[0]!r}")
    for path in filter(None, (options.csv, options.png)):
        check_writable(path)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    needed, free = 4 * options.n * (NUMBERS + MAPS * options.n), available_bytes(device)
    if free is not None and needed > free:
        options.error(f"--n: needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")
    ceilings = measure_ceilings(device, torch.float32, options.seconds)
    # Interpreted Triton kernels compute the same values, but their speed means nothing.
    jobs = [
        (op, backend)
        for op in options.op or OP_TABLE
        for backend in backends_of(op)
        if backend != "triton" or not INTERPRETED
    ]
    measured: list[tuple[dict[str, Any], Any]] = []
    with tqdm(jobs, desc="bench", unit="op", disable=options.quiet) as bar:
        for op, backend in bar:
            measured += measure(op, backend, options.n, options.seconds, device)
            # A run that is cut off leaves what it has measured.
            rows = [row | _share(row, cost, ceilings, device.type) for row, cost in measured]
            _write_csv(options, rows)
    # The speed of a machine drifts, so the best rates are measured before and after the ops.
    ceilings = ceilings.best(measure_ceilings(device, torch.float32, options.seconds))
    rows = [row | _share(row, cost, ceilings, device.type) for row, cost in measured]
    if not rows:
        raise ValueError("bench: no backend of these ops runs here; `pyglobenc doctor` prints the reasons")
    _show(rows, ceilings)
    _write_csv(options, rows)
    _write_png(options, rows)
    if options.save:
        _save(rows, device.type)
    return 0


def backends_of(op: str) -> tuple[str, ...]:
    """Return the names of an op's backends, in the op's own order."""
    from importlib import import_module

    return import_module(f"pyglobenc.ops.{op}").BACKENDS


def measure(
    op: str, backend: str, n: int, seconds: float, device: Any
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Measure an op on a backend, and yield a row of the table and its `pyglobenc.bench.costs.Cost`.

    Nothing is yielded if the backend can't run here.

    Args:
        op, backend: their names.
        n: number of tokens.
        seconds: time for the measurement.
        device: the torch device.
    """
    from importlib import import_module

    from pyglobenc.bench.ceilings import quartiles, times
    from pyglobenc.bench.costs import count
    from pyglobenc.bench.example_inputs import DH, H, tensors
    from pyglobenc.bench.op_table import OP_TABLE

    args, function = (
        OP_TABLE[op].arguments(tensors(device.type, n)),
        getattr(import_module(f"pyglobenc.ops.{op}"), op),
    )
    try:
        result = function(*args, backend=backend)
    except Exception:
        # Triton raises errors of many kinds. `pyglobenc doctor` prints the reason.
        return
    cost = count(op, args, result, batch=1, heads=H, n=n, dh=DH)
    samples = times(lambda: function(*args, backend=backend), device, seconds)
    low, middle, high = quartiles(samples)
    row = {
        "op": op,
        "backend": backend,
        "n": n,
        "dtype": "float32",
        "median_s": middle,
        "q1_s": low,
        "q3_s": high,
        "rounds": len(samples),
    }
    yield row | {"flops": cost.flops, "exps": cost.exps, "bytes": cost.bytes}, cost


def _share(row: dict[str, Any], cost: Any, ceilings: Any, kind: str) -> dict[str, Any]:
    """Return the rest of a row: the least time at the machine's best rates, and where it was measured."""
    import torch

    from pyglobenc.backends.measurements import device_name

    floor = cost.floor(ceilings, overlap=kind == "cuda")
    ratios = {"floor_s": floor, "share": floor / row["median_s"]}
    reached = {"gemm_flops": ceilings.flops, "exp_rate": ceilings.exps, "copy_bytes": ceilings.bytes}
    return (
        ratios
        | reached
        | {"threads": torch.get_num_threads(), "device": device_name(kind), "torch": torch.__version__}
    )


def _show(rows: list[dict[str, Any]], ceilings: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    head = f"{rows[0]['device']}, {rows[0]['threads']} threads, float32: "
    reached = f"exponentials {ceilings.exps / 1e9:.2f} G/s, copy {ceilings.bytes / 1e9:.1f} GB/s"
    print(f"{head}products {ceilings.flops / 1e9:.0f} GFLOP/s, {reached}")
    table = Table(title=f"BERT-base's shape, n = {rows[0]['n']}")
    for name in ("op", "backend", "ms", "quartiles", "GFLOP/s", "GB/s", "share"):
        table.add_column(name, justify="left" if name in ("op", "backend") else "right")
    for row in rows:
        seconds = row["median_s"]
        speeds = f"{row['flops'] / seconds / 1e9:.1f}", f"{row['bytes'] / seconds / 1e9:.1f}"
        quartiles = f"{row['q1_s'] * 1e3:.3f} to {row['q3_s'] * 1e3:.3f}"
        table.add_row(
            row["op"], row["backend"], f"{seconds * 1e3:.3f}", quartiles, *speeds, f"{row['share']:.0%}"
        )
    Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 110).print(table)


def _write_csv(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from pyglobenc.common.files import write_file

    if options.csv and rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        )
        write_file(options.csv, text.getvalue().encode())


def _write_png(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from pyglobenc.common.files import write_file

    if options.png:
        from pyglobenc.bench.roofline import roofline

        picture = io.BytesIO()
        roofline(rows, f"{rows[0]['device']}, {rows[0]['threads']} threads").savefig(
            picture, format="png", dpi=150
        )
        write_file(options.png, picture.getvalue())


def fastest_first(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the backends of each op that ran, in the order that backend="auto" shall try them.

    It is the op's own order, unless a backend other than its first one is clearly the fastest.
    """
    orders = {}
    for op in dict.fromkeys(row["op"] for row in rows):
        found = {row["backend"]: row for row in rows if row["op"] == op}
        order = [name for name in backends_of(op) if name in found]
        best = min(found, key=lambda name: found[name]["median_s"])
        # The noise of a busy machine must not change the order, so the quartiles must not overlap.
        if found[best]["q3_s"] < found[order[0]]["q1_s"]:
            order = [best, *(name for name in order if name != best)]
        orders[op] = order
    return orders


def _save(rows: list[dict[str, Any]], kind: str) -> None:
    from pyglobenc.backends.measurements import save_table

    path = save_table(kind, fastest_first(rows))
    if path is not None:
        print(printable(f"backend=auto now uses these measurements: {path}"))

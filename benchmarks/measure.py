"""Measurements beside pytest-benchmark's own: ratios of two calls in turn, peak memory in a process of its
own. Tables that keep the rows of other devices.
"""

import csv
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from pyglobenc.bench.costs import synchronize
from pyglobenc.common.files import write_file

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call up to the end of what it gave the device."""

    def run() -> Any:
        result = call()
        synchronize(DEVICE)
        return result

    return run


def paired_times(
    call: Callable[[], object],
    baseline: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Run baseline and call in turn, and return the seconds of both for each round."""
    taken = []
    for _ in range(rounds):
        start = clock()
        baseline()
        middle = clock()
        call()
        taken.append((middle - start, clock() - middle))
    return taken


def spread(numbers: list[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles of one number or more."""
    low, _, high = quantiles(numbers, n=4) if len(numbers) > 1 else numbers * 3
    return median(numbers), low, high


def paired_ratio(
    call: Callable[[], object],
    baseline: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, str]:
    """Run baseline and call in turn and return the quartiles of call's time over the baseline's of the same
    round.

    The speed of a shared machine drifts: a ratio of neighbours in time keeps its meaning, a ratio of two
    medians doesn't.
    """
    return ratio_of(paired_times(call, baseline, rounds, clock))


def ratio_of(taken: Iterable[Iterable[float]]) -> dict[str, str]:
    """Return the quartiles of the ratios of rounds, each the seconds of the baseline and of the call."""
    middle, low, high = spread([ours / plain for plain, ours in taken])
    return {"ratio": f"{middle:.3f}", "ratio_q1": f"{low:.3f}", "ratio_q3": f"{high:.3f}"}


def time_in_turn(
    benchmark: Any,
    call: Callable[[], object],
    baseline: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time call with pytest-benchmark, after baseline in each round, and note the quartiles of the ratios.

    It takes half the time of `paired_ratio` with a benchmark beside it.
    """
    taken = []

    def before() -> None:
        start = clock()
        baseline()
        taken.append([clock() - start])

    def timed() -> None:
        start = clock()
        call()
        taken[-1].append(clock() - start)

    benchmark.pedantic(timed, setup=before, rounds=rounds, iterations=1)
    benchmark.extra_info.update(ratio_of(taken))


def peak_memory_mb(script: Path, *args: str) -> float:
    """Peak resident memory, in MiB, of `python script args` (Linux)."""
    code = (
        f"import runpy, sys; sys.argv = {[str(script), *args]!r}; runpy.run_path(sys.argv[0], "
        f"run_name='__main__')"
    )
    code += "; print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return int(out.split()[-1]) / 1024


def forget_resident_peak() -> None:
    """Start `resident_mb` anew from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mb() -> float:
    """Highest resident memory of this process so far, in MiB (Linux); getrusage's would start from the
    parent's.
    """
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def merge(path: Path, rows: list[dict], parameters: Iterable[str]) -> None:
    """Write rows to a CSV, in the place of those of the same benchmark, parameters, threads and device."""
    names = ("benchmark", *parameters, "threads", "device")

    def key(row):
        return tuple("" if row.get(name) is None else str(row[name]) for name in names)

    kept = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.exists() else []
    new = {key(row) for row in rows}
    rows = [row for row in kept if key(row) not in new] + rows
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())

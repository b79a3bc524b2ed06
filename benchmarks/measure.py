"""Measurements beside pytest-benchmark's own: ratios of two calls in turn, peak memory in a process of its
own.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from pyglobenc.bench.costs import synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finished(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call up to the end of what it gave the device."""

    def run() -> Any:
        result = call()
        synchronize(DEVICE)
        return result

    return run


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
    ratios = []
    for _ in range(rounds):
        start = clock()
        baseline()
        middle = clock()
        call()
        ratios.append((clock() - middle) / (middle - start))
    low, _, high = quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return {"ratio": f"{median(ratios):.3f}", "ratio_q1": f"{low:.3f}", "ratio_q3": f"{high:.3f}"}


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

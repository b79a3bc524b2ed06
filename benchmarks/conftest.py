"""Options of every benchmark, and the CSV that a run leaves: `pytest benchmarks/bench_x.py --csv x` writes results/x.csv."""

import csv
from pathlib import Path

import pytest
import torch

from pyglobenc.device_table import device_name

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    parser.addoption("--csv", metavar="NAME", help="write medians and quartiles to benchmarks/results/NAME.csv")
    parser.addoption("--threads", type=int, default=2, help="torch threads (default 2)")


@pytest.fixture(autouse=True)
def threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)


def pytest_sessionfinish(session):
    name = session.config.getoption("--csv")
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if not name or benchmarks is None or not benchmarks.benchmarks:
        return
    rows = [row_of(b, session.config.getoption("--threads")) for b in benchmarks.benchmarks if not b.has_error]
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def row_of(benchmark, threads: int) -> dict:
    """One line of the CSV: what ran, seconds, what the benchmark reported beside them, and where it ran."""
    stats = benchmark.stats
    return {
        "benchmark": benchmark.name.split("[")[0].removeprefix("bench_").removeprefix("test_"),
        **(benchmark.params or {}),
        "median_s": f"{stats.median:.6g}",
        "q1_s": f"{stats.q1:.6g}",
        "q3_s": f"{stats.q3:.6g}",
        "rounds": stats.rounds,
        **benchmark.extra_info,
        "threads": threads,
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "torch": torch.__version__,
    }

"""Options of every benchmark, and the CSV that a run leaves: `pytest benchmarks/bench_x.py --csv x` writes
results/x.csv.
"""

import csv
from pathlib import Path

import pytest
import torch
from measure import DEVICE

from pyglobenc.backends.measurements import device_name

RESULTS = Path(__file__).parent / "results"
# of --quick: tokens of a batch at most, and dtypes
QUICK_TOKENS, QUICK_DTYPES = 1024, ("float32", "bfloat16")


def pytest_addoption(parser):
    parser.addoption(
        "--csv", metavar="NAME", help="write medians and quartiles to benchmarks/results/NAME.csv"
    )
    parser.addoption("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.addoption(
        "--quick", action="store_true", help=f"only batches of at most {QUICK_TOKENS} tokens, no float16"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        items[:] = [item for item in items if not hasattr(item, "callspec") or is_quick(item.callspec.params)]


def is_quick(params: dict) -> bool:
    return (
        params.get("n", 0) * params.get("batch", 1) <= QUICK_TOKENS
        and params.get("dtype", "float32") in QUICK_DTYPES
    )


# node of a benchmark -> kind of the device that it ran on
KINDS = {}


@pytest.fixture(autouse=True)
def surroundings(request):
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)
    # a suite for one device alone says which
    KINDS[request.node.nodeid] = getattr(request.module, "DEVICE", DEVICE).type


def pytest_sessionfinish(session):
    name = session.config.getoption("--csv")
    benchmarks = getattr(session.config, "_benchmarksession", None)
    if not name or benchmarks is None or not benchmarks.benchmarks:
        return
    rows = [
        row_of(b, session.config.getoption("--threads")) for b in benchmarks.benchmarks if not b.has_error
    ]
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(
            file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def row_of(benchmark, threads: int) -> dict:
    """One line of the CSV: what ran, seconds of one call, what the benchmark reported beside them, and where
    it ran.
    """
    stats, calls = benchmark.stats, benchmark.extra_info.get("calls_a_round", 1)
    return {
        "benchmark": benchmark.name.split("[")[0].removeprefix("bench_").removeprefix("test_"),
        **(benchmark.params or {}),
        "median_s": f"{stats.median / calls:.6g}",
        "q1_s": f"{stats.q1 / calls:.6g}",
        "q3_s": f"{stats.q3 / calls:.6g}",
        "rounds": stats.rounds,
        **benchmark.extra_info,
        "threads": threads,
        "device": device_name(KINDS[benchmark.fullname]),
        "torch": torch.__version__,
    }

"""Options of every benchmark, and the CSV that a run leaves: `pytest benchmarks/bench_x.py --csv x` writes
results/x.csv, which keeps the rows of other devices.
"""

from pathlib import Path

import pytest
import torch
from measure import DEVICE, merge

from pyglobenc.backends.measurements import device_name

RESULTS = Path(__file__).parent / "results"
# of --quick: tokens of a batch at most, and dtypes
QUICK_TOKENS, QUICK_DTYPES = 1024, ("float32", "bfloat16")


def pytest_addoption(parser):
    parser.addoption(
        "--csv", metavar="NAME", help="write medians and quartiles to benchmarks/results/NAME.csv, or a path"
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
    yield
    # after each benchmark, so that a run that is cut off leaves what it measured
    write_rows(request.config)


def write_rows(config):
    name, session = config.getoption("--csv"), getattr(config, "_benchmarksession", None)
    measured = [one for one in session.benchmarks if not one.has_error] if name and session else []
    if measured:
        threads = config.getoption("--threads")
        parameters = {key for one in measured for key in one.params or {}}
        merge(RESULTS / f"{name}.csv", [row_of(one, threads) for one in measured], parameters)


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

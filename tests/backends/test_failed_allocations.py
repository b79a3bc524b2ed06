"""Memory that can't be had: every allocation of the ops fails once, and raises an error that Python shows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import ops_of
from pair_cases import KERNELS

SUPPORT = Path(__file__).parents[1] / "support"
SETS = [kernel.values[0].partition("-")[2] for kernel in KERNELS if not kernel.marks]

pytestmark = pytest.mark.skipif(not SETS, reason="the compiled module is missing")


# The module's part of these ops needs no memory of its own.
WITHOUT = ("mapped_square", "relevance_maps", "relevance_product")


@pytest.fixture(scope="module")
def allocator(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ on Linux")
    library = tmp_path_factory.mktemp("allocator") / "failing_allocator.so"
    source = SUPPORT / "failing_allocator.cpp"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def failures(allocator, *arguments):
    """The number of failed allocations, by call and library; a crash or a wrong result fails the test."""
    paths = [str(SUPPORT), str(SUPPORT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, SUPPORT / "failing_allocations.py", *arguments],
        env=os.environ | {"LD_PRELOAD": str(allocator), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "threads, sets", [("1", SETS[:1]), pytest.param("2", SETS, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_ops(allocator, threads, sets):
    counts = failures(allocator, "ops", threads, *sets)
    assert set(counts) == {f"{op} {name}" for op in ops_of("cpu") for name in sets}
    for call, by_library in counts.items():
        assert by_library["libc10."] and (by_library["_cpu."] or call.startswith(WITHOUT)), call


@pytest.mark.slow
def test_models(allocator):
    for call, by_library in failures(allocator, "models").items():
        assert by_library["libc10."] > 3 and by_library["_cpu."], call

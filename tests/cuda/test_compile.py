"""What nvcc makes of each CUDA kernel for GPUs that need not be there: registers, and nothing spilled."""

import csv
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "build" / "cuda_resources.csv"
CAPABILITIES = tuple(map(int, os.environ.get("PYGLOBENC_CUDA_ARCHS", "80,90,100").split(",")))
SOURCES = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem != "device"]
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<capability>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) "
    "registers",
    re.DOTALL,
)


def compile_source(source: Path, folder: Path) -> list[dict]:
    """Resources of each kernel of a source for each capability, as ptxas reports them."""
    # one PTX for all, as setup.py makes it
    targets = f"-gencode=arch=compute_{CAPABILITIES[0]},code=[{','.join(f'sm_{c}' for c in CAPABILITIES)}]"
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        targets,
        "-Xptxas",
        "-v",
        "-fatbin",
        source,
        "-o",
        folder / f"{source.stem}.fatbin",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [{"source": source.name, **found.groupdict()} for found in REPORT.finditer(done.stderr)]


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """Rows of the table, which is left behind."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("fatbin")
    with ThreadPoolExecutor(2) as pool:
        rows = [
            row for found in pool.map(lambda source: compile_source(source, folder), SOURCES) for row in found
        ]
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def test_every_kernel_compiles_for_every_capability(resources):
    kernels = {(row["source"], row["kernel"]) for row in resources}
    assert {source for source, _ in kernels} == {source.name for source in SOURCES}
    for capability in CAPABILITIES:
        assert {
            (row["source"], row["kernel"]) for row in resources if row["capability"] == str(capability)
        } == kernels


def test_nothing_spills(resources):
    assert [row for row in resources if int(row["spilled"]) or int(row["stack"])] == []

"""Builds the CUDA kernels for the CPU, where one thread runs all threads of a block: csrc/common/fibers.h."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

COMMON, CUDA = (Path(__file__).parents[2] / "csrc" / name for name in ("common", "cuda"))
# longjmp between stacks is not an unwinding, as fortified builds take it to be
FLAGS = "-std=c++17 -fPIC -U_FORTIFY_SOURCE -Wall -Wextra -Wno-unknown-pragmas -DPYGLOBENC_EMULATED".split()
# kernels tell of every access to memory: csrc/common/races.h
KINDS = {".cu": ["-O1", "-fsanitize=thread"], ".cpp": ["-O0"], "races.cpp": ["-O2"]}


def link(sources: list[Path], folder: Path) -> Path:
    """Return a library built from sources, whose kernels run on CPU tensors; skip if it can't be built."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the emulator needs g++ on Linux")
    pybind11 = pytest.importorskip("pybind11", reason="the emulator's module needs pybind11")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]

    def run(*command):
        done = subprocess.run([compiler, *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def compile_source(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        run(
            *FLAGS,
            *KINDS.get(source.name, KINDS[source.suffix]),
            *includes,
            "-x",
            "c++",
            "-c",
            source,
            "-o",
            output,
        )
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    path = folder / "_cuda.so"
    run("-shared", *objects, "-o", path)
    return path


def build(folder: Path) -> ModuleType:
    """Return the emulated module pyglobenc._cuda."""
    # If several objects define a function, the linker takes the first one, so the fastest comes first.
    path = link([COMMON / "races.cpp", CUDA / "bindings.cpp", *sorted(CUDA.glob("*.cu"))], folder)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

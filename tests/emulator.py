"""Builds the CUDA kernels for the CPU, every thread of a block in turn: csrc/common/fibers.h."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
# longjmp between stacks is not an unwinding, as fortified builds take it to be
FLAGS = ["-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DPYGLOBENC_EMULATED"]


def build(folder: Path) -> ModuleType:
    """Module pyglobenc._cuda with kernels that run on CPU tensors; skips where it can't be built."""
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
        optimised = "-O1" if source.suffix == ".cu" else "-O0"
        run(*FLAGS, optimised, *includes, "-x", "c++", "-c", source, "-o", output)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, [CUDA / "bindings.cpp", *sorted(CUDA.glob("*.cu"))]))
    path = folder / "_cuda.so"
    run("-shared", *objects, "-o", path)
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

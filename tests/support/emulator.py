"""Builds the CUDA kernels for the CPU, where one thread runs all threads of a block: csrc/common/fibers.h."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
COMMON, CUDA = (ROOT / "csrc" / name for name in ("common", "cuda"))
# Compiling takes 20 seconds, so a library is kept until one of its sources changes.
KEPT = ROOT / "build" / "emulator"
# longjmp between stacks is not an unwinding, as fortified builds take it to be
FLAGS = "-std=c++17 -fPIC -U_FORTIFY_SOURCE -Wall -Wextra -Wno-unknown-pragmas -DPYGLOBENC_EMULATED".split()
# The files of `joined` include kernels whose types use anonymous namespaces. No two files define one type.
FLAGS += ["-Wno-subobject-linkage"]
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


def joined(folder: Path) -> list[Path]:
    """Return two files that include all kernels, so that what they share is compiled twice and not 13 times.

    There are two files since some kernels of either have helpers of one name.
    """
    halves = {"globenc.cu": [], "relevance.cu": []}
    for path in sorted(CUDA.glob("*.cu")):
        halves["relevance.cu" if "relevance" in path.name else "globenc.cu"].append(path)
    for name, paths in halves.items():
        (folder / name).write_text("".join(f'#include "{path}"\n' for path in paths))
    return [folder / name for name in halves]


def key() -> str:
    """Return a digest of everything that the emulated module is built from."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(f"{compiler} {version('pybind11')} {sys.version} {FLAGS} {KINDS}".encode())
    for path in sorted(path for folder in (COMMON, CUDA) for path in folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def keep(library: Path, path: Path) -> None:
    """Copy a library to `path` and delete the ones of other sources there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may look for the library at the same time, so it appears complete.
    part = path.with_suffix(f".{os.getpid()}")
    shutil.copy(library, part)
    part.rename(path)
    for other in path.parent.glob("*.so"):
        if other != path:
            other.unlink(missing_ok=True)


def build(folder: Path) -> ModuleType:
    """Return the emulated module pyglobenc._cuda, compiled unless one of the same sources is kept."""
    pytest.importorskip("pybind11", reason="the emulator's module needs pybind11")
    path = KEPT / f"{key()}.so" if shutil.which("g++") else folder
    if not path.is_file():
        # If several objects define a function, the linker takes the first one, so the fastest comes first.
        library = link([COMMON / "races.cpp", *joined(folder), CUDA / "bindings.cpp"], folder)
        keep(library, path)
        path = library
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""`pyglobenc doctor` prints versions and hardware, the kernels that run here, and why the others don't."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib import metadata

from pyglobenc.common.characters import printable

NAME = "doctor"
HELP = "print versions and hardware, and try every kernel"
PACKAGES = ("torch", "transformers", "triton", "numpy", "safetensors")
TOOLS = {"C++ compiler": ("c++", "g++", "clang++"), "CUDA compiler": ("nvcc",), "ninja": ("ninja",)}
# The CPU kernels and torch are faster with these instruction sets.
FEATURES = "avx2 fma avx512f avx512bw avx512vl avx512dq avx512_bf16 amx_bf16 asimd sve bf16".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing, because the command has no arguments."""


def run(options: argparse.Namespace) -> int:
    """Print the report; return 1 if an op can't run even its reference, else 0."""
    from pyglobenc._version import __version__

    _print(
        {
            "pyglobenc": __version__,
            "Python": f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
            "CPU": _cpu(),
            "features": ", ".join(_features()) or "unknown",
            "CPU kernels": _instruction_sets(),
            "threads": _threads(),
            "memory": _memory(),
            "GPU": _gpu(),
            **{name: _tool(commands) for name, commands in TOOLS.items()},
            "model minilm": _minilm(),
            "backend auto": _order(),
        }
    )
    return _kernels()


def _print(rows: dict[str, str]) -> None:
    for name, value in rows.items():
        print(f"{name:14} {printable(value)}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpuinfo() -> dict[str, str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, value in lines}


def _cpu() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _features() -> list[str]:
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return [name for name in FEATURES if name in flags]


def _instruction_sets() -> str:
    try:
        from pyglobenc.backends.cpu._extension import kernels
    except ImportError as error:
        return str(error)
    return f"of {', '.join(kernels.instruction_sets())}, the first is in use"


def _threads() -> str:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    variable = os.environ.get("OMP_NUM_THREADS")
    limit = f", OMP_NUM_THREADS={variable}" if variable else ""
    return f"torch uses {torch.get_num_threads()}; {usable} of {os.cpu_count()} processors are usable{limit}"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return "; ".join(
            f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in found
        )
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    return f"none: torch (CUDA {torch.version.cuda}) sees no GPU or no driver"


def _tool(commands: tuple[str, ...]) -> str:
    path = next(filter(None, map(shutil.which, commands)), None)
    if path is None:
        return "not found"
    try:
        out = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} doesn't run: {error}"
    # nvcc prints its release in its last lines, other tools in their first.
    lines = [line for line in out.splitlines() if "release" in line] or out.splitlines()
    return f"{lines[0].strip() if lines else 'unknown version'} ({path})"


def _minilm() -> str:
    from pyglobenc.models.pretrained import model_folder

    try:
        return model_folder("minilm")
    except ValueError as error:
        return str(error)


def _order() -> str:
    from pyglobenc.backends.measurements import tables

    return (
        "takes each op's fastest, measured in " + ", then ".join(map(str, reversed(tables())))
        if tables()
        else "takes each op's first backend that runs"
    )


def _kernels() -> int:
    from pyglobenc.backends.dispatch import ROOMS
    from pyglobenc.bench.example_inputs import op_names, try_op

    ops, why, broken = op_names(), defaultdict(list), False
    width = max(map(len, ops))
    print(
        "\nEvery kernel was tried on a small input. A number is its largest error against the reference, "
        "relative to the largest entry. no: it doesn't run here. -: there is no such kernel."
    )
    print(f"{'op':{width}}  " + "".join(f"{room:>10}" for room in ROOMS))
    for op in ops:
        cells = []
        for room in ROOMS:
            result, reason = try_op(op, room)
            cells.append(f"{result:>10}")
            if reason:
                why[room, reason].append(op)
                broken |= room == "reference"
        print(f"{op:{width}}  " + "".join(cells))
    for (room, reason), names in why.items():
        print(f"\n{room}: {printable(reason)}\n  {', '.join(names)}")
    return int(broken)

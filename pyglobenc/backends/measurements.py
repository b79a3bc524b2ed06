"""Which backend was the fastest for an op on a device, as `pyglobenc bench` measured it; read by backend="auto".

A JSON file, {device: {op: [backends, fastest first]}}, at PYGLOBENC_TABLE, else in the user's cache folder; where it says nothing, the
measurements that come with the package. An empty PYGLOBENC_TABLE means neither. Without an entry the order is that of the op's own list.
"""

import json
import logging
import os
import platform
from functools import cache, lru_cache
from pathlib import Path

log = logging.getLogger("pyglobenc")

# what comes with the package: where it is installed, and in a checkout
SHIPPED = (Path(__file__).parents[1] / "measured" / "backends.json", Path(__file__).parents[2] / "benchmarks" / "results" / "backends.json")


def table_path() -> Path | None:
    """Where the table is, or would be; None if there is to be none."""
    chosen = os.environ.get("PYGLOBENC_TABLE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pyglobenc" / "backends.json"


@cache
def device_name(kind: str) -> str:
    """The GPU's name for "cuda", else the processor's model and the number of its cores."""
    if kind == "cuda":
        # the command line's help does without torch, which takes seconds
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {len(models) or os.cpu_count()} cores"


def preferred(op: str, available: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """The backends of an op in the order to try them on a device of kind "cpu" or "cuda"."""
    table = _table()
    measured = table.get(device_name(kind), {}).get(op, []) if table else []
    first = [name for name in measured if name in available]
    rest = [name for name in available if name not in first]
    # a CPU tensor's own kernels needn't wait for the others' reasons
    return (*first, *(sorted(rest, key=lambda name: name != "cpu") if kind == "cpu" else rest))


def tables() -> list[Path]:
    """Files that "auto" goes by, a later one before an earlier."""
    path = table_path()
    return [] if path is None else [file for file in (*SHIPPED, path) if file.exists()]


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, list[str]]]:
    """The files' contents; read once."""
    out: dict[str, dict[str, list[str]]] = {}
    for path in tables():
        for device, ops in _read(path).items():
            out[device] = out.get(device, {}) | ops
    return out


def _read(path: Path) -> dict[str, dict[str, list[str]]]:
    try:
        found = json.loads(path.read_bytes())
        return {device: {op: [str(name) for name in names] for op, names in ops.items()} for device, ops in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s is not a table of backends and is passed over: %s", path, error)
        return {}


def save_table(kind: str, orders: dict[str, list[str]]) -> Path | None:
    """Write a device's entries, leaving other devices' alone; returns the file, None if there is to be none."""
    from pyglobenc.common.files import write_file

    path = table_path()
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path) if path.exists() else {}
    write_file(path, (json.dumps(known | {device_name(kind): orders}, indent=1, sort_keys=True) + "\n").encode())
    _table.cache_clear()
    return path

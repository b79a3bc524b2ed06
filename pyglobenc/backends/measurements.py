"""The table of measurements that backend="auto" uses: for each device and op, the backends by speed.

`pyglobenc bench --save` writes a JSON file, {device: {op: [backends]}}, to the path in PYGLOBENC_TABLE, or to
the user's cache folder. Where that file has no entry, the measurements that come with the package count, and
after them the order of the op's own list. An empty PYGLOBENC_TABLE turns both files off.
"""

import json
import logging
import os
import platform
from functools import cache, lru_cache
from pathlib import Path

log = logging.getLogger("pyglobenc")

# The package's own measurements: in an installation, and in a checkout.
SHIPPED = (
    Path(__file__).parents[1] / "measured" / "backends.json",
    Path(__file__).parents[2] / "benchmarks" / "results" / "backends.json",
)


def table_path() -> Path | None:
    """Return the path of the user's table, which need not exist; None if PYGLOBENC_TABLE is empty."""
    chosen = os.environ.get("PYGLOBENC_TABLE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pyglobenc" / "backends.json"


@cache
def device_name(kind: str) -> str:
    """Return the GPU's name for "cuda", else the model of the processor and its number of cores."""
    if kind == "cuda":
        # Importing torch takes seconds, and the command line's help does not need it.
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{models[0] if models else platform.processor() or platform.machine()}, "
        f"{len(models) or os.cpu_count()} cores"
    )


def preferred(op: str, available: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """Return the backends of an op in the order to try them; kind is "cpu" or "cuda"."""
    table = _table()
    measured = table.get(device_name(kind), {}).get(op, ()) if table else ()
    return _order(tuple(measured), available, kind)


@cache
def _order(measured: tuple[str, ...], available: tuple[str, ...], kind: str) -> tuple[str, ...]:
    first = [name for name in measured if name in available]
    rest = [name for name in available if name not in first]
    # For CPU tensors the CPU kernels come first, because the GPU backends would refuse them.
    return (*first, *(sorted(rest, key=lambda name: name != "cpu") if kind == "cpu" else rest))


def tables() -> list[Path]:
    """Return the tables that exist; entries of a later one override those of an earlier one."""
    path = table_path()
    return [] if path is None else [file for file in (*SHIPPED, path) if file.exists()]


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, list[str]]]:
    """Read all tables, once per process."""
    out: dict[str, dict[str, list[str]]] = {}
    for path in tables():
        for device, ops in _read(path).items():
            out[device] = out.get(device, {}) | ops
    return out


def _read(path: Path) -> dict[str, dict[str, list[str]]]:
    try:
        found = json.loads(path.read_bytes())
        return {
            device: {op: [str(name) for name in names] for op, names in ops.items()}
            for device, ops in found.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("%s is not a table of backends and is passed over: %s", path, error)
        return {}


def save_table(kind: str, orders: dict[str, list[str]]) -> Path | None:
    """Write the entries of this device and keep those of others; return the path, None if tables are off."""
    from pyglobenc.common.files import write_file

    path = table_path()
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path) if path.exists() else {}
    write_file(
        path, (json.dumps(known | {device_name(kind): orders}, indent=1, sort_keys=True) + "\n").encode()
    )
    _table.cache_clear()
    return path

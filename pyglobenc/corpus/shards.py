"""Parquet shards of attributions, each written whole or not at all.

Names that readers of a folder of Parquet files pass over start with _ or a dot, so that the folder as it stands is one table.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyglobenc.corpus.records import _arrow


def shard_path(folder: Path, number: int) -> Path:
    """Of shard `number`, from 0."""
    return folder / f"part-{number:06d}.parquet"


def rejected_path(folder: Path, number: int) -> Path:
    """Of the side file of shard `number`: a JSON line for every record left out."""
    return folder / f"_rejected-{number:06d}.jsonl"


def write_shard(folder: Path, number: int, rows: list[dict[str, Any]], rejected: list[dict[str, Any]], common: dict[str, Any]) -> None:
    """Write a shard's rows and, before it, what was left out of it: a shard that is there is complete, side file and all.

    Args:
        folder: of the output.
        number: of the shard.
        rows: one a text, in input order: index, text, and fields of `Attribution`, scores (n,) float32 or float64.
        rejected: index and reason of each record left out.
        common: method and model, the same for every row, and settings.

    Raises:
        OSError: not written; what was complete before stays so.
    """
    side = rejected_path(folder, number)
    if rejected:
        write_durably(side, "".join(json.dumps(entry) + "\n" for entry in rejected).encode())
    write_durably(shard_path(folder, number), _parquet_bytes(rows, common))


def write_durably(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, under one temporary name, so that what a killed job left is overwritten by the next.

    Raises:
        OSError: with the path as its filename.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            # a disk may only report that it is full when told to write
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _parquet_bytes(rows: list[dict[str, Any]], common: dict[str, Any]) -> memoryview:
    arrow = _arrow()
    floats = arrow.float64() if common["dtype"] == "float64" else arrow.float32()
    types = {
        "index": arrow.int64(),
        "text": arrow.string(),
        "tokens": arrow.list_(arrow.string()),
        "scores": arrow.list_(floats),
        "log_scale": arrow.float64(),
        "target": arrow.int64(),
        "target_name": arrow.string(),
        "target_kind": arrow.string(),
        "label": arrow.string(),
        "probability": arrow.float64(),
        "cut": arrow.int64(),
    }
    columns = {name: arrow.array([row.get(name) for row in rows], type=kind) for name, kind in types.items()}
    for name in ("method", "model"):
        columns[name] = arrow.array([common[name]] * len(rows), type=arrow.string())
    table = arrow.table(columns).replace_schema_metadata({"pyglobenc": json.dumps(common, sort_keys=True)})
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())

"""Parquet shards of attributions, each written whole or not at all, and known as complete by what is in them.

Names that readers of a folder of Parquet files pass over start with _ or a dot, so that the folder as it
stands is one table.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyglobenc.common.files import temporary_prefix, write_file
from pyglobenc.scale.corpus.records import load_arrow

try:
    import fcntl
except ImportError:
    # Windows: two jobs may compute the same shard, and each writes it whole
    fcntl = None

# what file systems without locks say
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
KEY = "pyglobenc"
MISSING = "it isn't there"


@dataclass(frozen=True)
class Part:
    """The records of a shard: its number, the number of the first record, how many they are, and the SHA-256
    of their texts.
    """

    shard: int
    first: int
    records: int
    sha256: str


@dataclass(frozen=True)
class Found:
    """What is there of a shard: why it isn't complete, or None; and the rows of a complete one."""

    lacks: str | None
    rows: int = 0


def shard_path(folder: Path, number: int) -> Path:
    """Of shard `number`, from 0."""
    return folder / f"part-{number:06d}.parquet"


def rejected_path(folder: Path, number: int) -> Path:
    """Of the side file of shard `number`: a JSON line for every record left out."""
    return folder / f"_rejected-{number:06d}.jsonl"


def write_shard(
    folder: Path,
    part: Part,
    rows: list[dict[str, Any]],
    rejected: list[dict[str, Any]],
    common: dict[str, Any],
) -> None:
    """Write a shard's rows and, before it, what was left out of it: a shard that is there is complete, side
    file and all.

    Symbolic links of these names are replaced, not followed.

    Args:
        folder: of the output.
        part: the records that the shard holds.
        rows: one a text, in input order: index, text, and fields of `Attribution`, scores (n,) float32 or
            float64.
        rejected: index and reason of each record left out.
        common: method and model, the same for every row, and settings.

    Raises:
        OSError: not written; what was complete before stays so.
    """
    side, data = (
        rejected_path(folder, part.shard),
        "".join(json.dumps(entry) + "\n" for entry in rejected).encode(),
    )
    if rejected:
        write_file(side, data, follow=False)
    else:
        side.unlink(missing_ok=True)
    facts = _facts(part, common) | {"rejected_sha256": hashlib.sha256(data).hexdigest()}
    write_file(shard_path(folder, part.shard), _parquet_bytes(rows, common, facts), follow=False)


def look_at_shard(folder: Path, part: Part, common: dict[str, Any]) -> Found:
    """Tell whether a shard is there and complete, by its footer, its index column and its side file; the rest
    isn't read.
    """
    path, side = shard_path(folder, part.shard), rejected_path(folder, part.shard)
    if not os.path.lexists(path):
        return Found(MISSING)
    # a link may lead anywhere
    if not _is_regular(path) or (os.path.lexists(side) and not _is_regular(side)):
        return Found("it, or its side file, is no regular file")
    arrow = load_arrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            return Found(_why_another(file, path, side, part, common), file.metadata.num_rows)
    # files that came from anywhere may raise anything
    except Exception as error:
        return Found(f"it can't be read: {' '.join(str(error).split())}")


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(os.lstat(path).st_mode)


def _why_another(file: Any, path: Path, side: Path, part: Part, common: dict[str, Any]) -> str | None:
    """Why a file isn't the shard of these records, or None."""
    facts = json.loads((file.schema_arrow.metadata or {}).get(KEY.encode(), b"{}"))
    side_sha256 = facts.pop("rejected_sha256", None)
    if facts != json.loads(json.dumps(_facts(part, common))):
        return "it holds other records, or is of another job"
    if not file.schema_arrow.remove_metadata().equals(_schema(common)):
        return "its columns are others"
    # the data is followed by the footer, the footer's length and the format's name
    if _end_of_data(file.metadata) + file.metadata.serialized_size + 8 > os.stat(path).st_size:
        return "it is cut"
    data = side.read_bytes() if side.exists() else b""
    if hashlib.sha256(data).hexdigest() != side_sha256:
        return f"{side.name} is missing or another"
    left_out = [json.loads(line)["index"] for line in data.splitlines()]
    index = file.read(["index"]).column(0).to_pylist()
    if index != sorted(index) or sorted(index + left_out) != list(
        range(part.first, part.first + part.records)
    ):
        return "its rows are others"
    return None


def _end_of_data(metadata: Any) -> int:
    end = 0
    for group in (metadata.row_group(number) for number in range(metadata.num_row_groups)):
        for chunk in (group.column(number) for number in range(group.num_columns)):
            first = min(filter(None, (chunk.data_page_offset, chunk.dictionary_page_offset)))
            end = max(end, first + chunk.total_compressed_size)
    return end


@contextmanager
def locked(folder: Path, name: str, wait: bool) -> Iterator[bool]:
    """Hold the lock called `name` of an output folder; the system lets go of it when the process ends,
    however it ends.

    The lock's file stays: a process that waits for it would otherwise hold another file than one that comes
    later.

    Args:
        folder: of the output.
        name: of the lock.
        wait: until another process lets go of it.

    Yields:
        Whether it is held, or the file system has no locks. False if another process holds it and wait is
        False.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    path = folder / f".lock-{name}"
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        raise OSError(
            error.errno, "is a symbolic link" if path.is_symlink() else error.strerror, str(path)
        ) from error
    try:
        yield _lock(handle, wait)
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def remove_temporary(*paths: Path) -> None:
    """Remove what killed writers of some files left, where locks keep the living ones out."""
    if fcntl is None:
        return
    for path in paths:
        prefix = temporary_prefix(path)
        for name in os.listdir(path.parent):
            if name.startswith(prefix) and name.endswith(".tmp"):
                with suppress(OSError):
                    os.unlink(path.with_name(name))


def _facts(part: Part, common: dict[str, Any]) -> dict[str, Any]:
    return common | {"part": asdict(part)}


def _schema(common: dict[str, Any]) -> Any:
    arrow = load_arrow()
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
        "predictions": arrow.list_(arrow.struct([("name", arrow.string()), ("value", arrow.float64())])),
        "cut": arrow.int64(),
        "method": arrow.string(),
        "model": arrow.string(),
    }
    return arrow.schema(list(types.items()))


def _parquet_bytes(rows: list[dict[str, Any]], common: dict[str, Any], facts: dict[str, Any]) -> memoryview:
    arrow, schema = load_arrow(), _schema(common)
    same = {name: common[name] for name in ("method", "model")}
    columns = [
        arrow.array([(row | same).get(field.name) for row in rows], type=field.type) for field in schema
    ]
    table = arrow.Table.from_arrays(
        columns, schema=schema.with_metadata({KEY: json.dumps(facts, sort_keys=True)})
    )
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(table, sink, compression="zstd")
    return memoryview(sink.getvalue())

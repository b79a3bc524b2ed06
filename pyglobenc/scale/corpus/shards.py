"""Parquet shards of attributions, each written whole or not at all, whose content shows if it is complete.

Other names in the output folder begin with _ or a dot. Readers of a folder of Parquet files ignore these
names, so the whole folder can be read as one table.
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
    # Windows has no fcntl. There two jobs may compute the same shard, and each one writes it whole.
    fcntl = None

# The errors that file systems without locks give.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
KEY = "pyglobenc"
# The SHA-256 of a shard's other bytes stands just before its footer. Readers of Parquet ignore it.
SEAL = 32
MISSING = "it isn't there"


@dataclass(frozen=True)
class Part:
    """The records of a shard.

    Attributes:
        shard: number of the shard, from 0.
        first: number of its first record.
        records: how many records it holds.
        sha256: SHA-256 of their texts.
    """

    shard: int
    first: int
    records: int
    sha256: str


@dataclass(frozen=True)
class Found:
    """What is found of a shard.

    Attributes:
        lacks: the reason why the shard isn't complete, or None.
        rows: number of rows of a complete shard.
    """

    lacks: str | None
    rows: int = 0


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of shard `number`, from 0."""
    return folder / f"part-{number:06d}.parquet"


def rejected_path(folder: Path, number: int) -> Path:
    """Return the path of the side file of shard `number`, with a JSON line for every record left out."""
    return folder / f"_rejected-{number:06d}.jsonl"


def write_shard(
    folder: Path,
    part: Part,
    rows: list[dict[str, Any]],
    rejected: list[dict[str, Any]],
    common: dict[str, Any],
) -> None:
    """Write a shard's rows and, before them, its side file of the records left out.

    So a shard that exists is complete, with its side file. Symbolic links with these names are replaced, not
    followed.

    Args:
        folder: folder of the output.
        part: the records that the shard holds.
        rows: one row for each text, in input order: index, text and the fields of `Attribution`, with scores
            (n,) float32 or float64. With common["keep"] also input, the values of these columns by name.
        rejected: index and reason of each record left out.
        common: method and model, the same for every row, dtype and settings; and the names of the input's
            columns that are kept, if there are any.

    Raises:
        OSError: the shard can't be written. Shards that were complete before stay complete.
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
    """Find whether a shard exists and is complete, and whether it and its side file are as they were written.

    Every byte of both files is read, but no column is decoded.
    """
    path, side = shard_path(folder, part.shard), rejected_path(folder, part.shard)
    if not os.path.lexists(path):
        return Found(MISSING)
    # A symbolic link may point to any file, so it isn't read.
    if not _is_regular(path) or (os.path.lexists(side) and not _is_regular(side)):
        return Found("it or its side file isn't a regular file")
    load_arrow()
    try:
        return _compare(path.read_bytes(), side, part, common)
    # A file of unknown origin may raise any exception.
    except Exception as error:
        return Found(f"it can't be read: {' '.join(str(error).split())}")


def _compare(data: bytes, side: Path, part: Part, common: dict[str, Any]) -> Found:
    """Find whether the bytes of a file are those of a complete shard."""
    arrow, start = load_arrow(), _footer_start(data)
    if hashlib.sha256(data[: start - SEAL] + data[start:]).digest() != data[start - SEAL : start]:
        return Found("its bytes aren't those that were written")
    metadata = arrow.parquet.read_metadata(arrow.BufferReader(data))
    facts = json.loads((metadata.metadata or {}).get(KEY.encode(), b"{}"))
    side_sha256 = facts.pop("rejected_sha256", None)
    if facts != json.loads(json.dumps(_facts(part, common))):
        return Found("it holds other records or belongs to another job")
    if hashlib.sha256(side.read_bytes() if side.exists() else b"").hexdigest() != side_sha256:
        return Found(f"{side.name} is missing or has another content")
    return Found(None, metadata.num_rows)


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(os.lstat(path).st_mode)


def _footer_start(data: bytes) -> int:
    """Return where a Parquet file's footer begins; the length of the footer comes after it."""
    return max(SEAL, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))


@contextmanager
def locked(folder: Path, name: str, wait: bool) -> Iterator[bool]:
    """Hold the lock called `name` of an output folder.

    The system releases the lock when the process ends, however it ends. The file of the lock stays. If it
    were removed, a process that waits for it and one that comes later would lock different files.

    Args:
        folder: folder of the output.
        name: name of the lock.
        wait: whether to wait until another process releases the lock.

    Yields:
        True if the lock is held, or if the file system has no locks. False if another process holds it and
        wait is False.

    Raises:
        OSError: the file of the lock can't be opened.
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
    """Remove the temporary files of killed writers of some files.

    On systems without locks nothing is removed, since a writer may still be at work.
    """
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
        "error": arrow.float64(),
        "cut": arrow.int64(),
        "method": arrow.string(),
        "model": arrow.string(),
    }
    if common.get("keep"):
        types["input"] = arrow.struct([(name, arrow.string()) for name in common["keep"]])
    return arrow.schema(list(types.items()))


def table_of(rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    """Return the table of some rows, with the columns of a shard; arguments as for `write_shard`."""
    arrow, schema = load_arrow(), _schema(common)
    same = {name: common[name] for name in ("method", "model")}
    columns = [
        arrow.array([(row | same).get(field.name) for row in rows], type=field.type) for field in schema
    ]
    return arrow.Table.from_arrays(columns, schema=schema)


def _parquet_bytes(rows: list[dict[str, Any]], common: dict[str, Any], facts: dict[str, Any]) -> bytes:
    arrow = load_arrow()
    table = table_of(rows, common).replace_schema_metadata({KEY: json.dumps(facts, sort_keys=True)})
    sink = arrow.BufferOutputStream()
    arrow.parquet.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    start = _footer_start(data)
    return data[:start] + hashlib.sha256(data).digest() + data[start:]

"""Texts of a corpus file, one record at a time; a record that can't be read is reported, never fatal."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# tried in order where no column is named
COLUMNS = ("text", "sentence")
CHUNK = 1 << 20
# the csv module refuses fields above its own limit of 128 KiB
LARGEST_FIELD = 1 << 30


@dataclass(frozen=True)
class Record:
    """One record: its number in the input, from 0, and its text, or the reason that there is none."""

    index: int
    text: str | None
    reason: str | None = None


@dataclass(frozen=True)
class Source:
    """A corpus that can be read any number of times.

    Attributes:
        path: file or folder.
        column: name or number of the column read; None for formats without columns.
        files: the files that hold the data.
        read: starts over and yields a text for every record, or an exception that says why it can't be read.
    """

    path: Path
    column: str | None
    files: tuple[Path, ...]
    read: Callable[[], Iterator[Any]]

    def records(self) -> Iterator[Record]:
        """Every record, in input order."""
        for index, text in enumerate(self.read()):
            reason = _reason(text)
            yield Record(index, None if reason else text, reason)

    def sha256(self) -> str:
        """Of the files' contents and order; names and places don't count."""
        total = hashlib.sha256()
        for path in self.files:
            one = hashlib.sha256()
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    one.update(chunk)
            total.update(one.digest())
        return total.hexdigest()


def _reason(text: Any) -> str | None:
    if isinstance(text, Exception):
        return " ".join(str(text).split()) or type(text).__name__
    if text is None:
        return "no text"
    if not isinstance(text, str):
        return f"the text must be a string, got {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 text (at character {error.start})"
    return None if text.strip() else "empty text"


def open_source(path: str | Path, column: str | None = None, header: bool = True) -> Source:
    """A corpus by its file's suffix: .txt, .csv, .tsv, .jsonl, .parquet, or a folder of Parquet files or of `datasets`' save_to_disk.

    Args:
        path: file or folder.
        column: which column or key holds the text; None for "text", "sentence" or the only one. A number without a header.
        header: the first line of a .csv or .tsv names its columns.

    Raises:
        ValueError: unknown format, no such column.
        OSError: the file can't be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file or folder", str(path))
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder(path, column)
    if suffix in (".txt", ".text", ""):
        return Source(path, None, (path,), lambda: _lines(path))
    if suffix in (".jsonl", ".ndjson", ".json"):
        key = column or "text"
        return Source(path, key, (path,), lambda: (_json_text(line, key) for line in _lines(path)))
    if suffix in (".csv", ".tsv"):
        return _csv(path, column, header)
    if suffix == ".parquet":
        return _parquet(path, (path,), column)
    raise ValueError(f"{path}: unknown format {suffix!r}; known: .txt, .csv, .tsv, .jsonl, .parquet, a folder that datasets saved")


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends; bytes that aren't UTF-8 become surrogates, which `_reason` names."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            yield line.decode("utf-8", errors="surrogateescape").rstrip("\r\n")


def _json_text(line: str, key: str) -> Any:
    if not line.strip():
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return ValueError(f"a line must hold an object with the key {key!r}, or a string, got {type(value).__name__}")
    if key not in value:
        return ValueError(f"no key {key!r}")
    return value[key]


def _csv(path: Path, column: str | None, header: bool) -> Source:
    csv.field_size_limit(LARGEST_FIELD)
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            names = next(csv.reader(file, **_dialect(path)), [])
        except csv.Error as error:
            raise ValueError(f"{path}: the first row is not CSV: {error}") from error
    if header:
        column = choose_column(path, names, column)
        position = names.index(column)
    else:
        column = column or "0"
        if not column.isdecimal() or int(column) >= len(names):
            raise ValueError(f"{path}: without a header the column is a number below {len(names)}, got {column!r}")
        position = int(column)

    def read() -> Iterator[Any]:
        rows = _rows(path, position)
        if header:
            next(rows, None)
        return rows

    return Source(path, column, (path,), read)


def _dialect(path: Path) -> dict[str, Any]:
    # tab-separated files have no quoting: a lone quote in a text must not swallow the lines after it
    # elsewhere one that is never closed would swallow them too: strict reports it
    return {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {"strict": True}


def _rows(path: Path, position: int) -> Iterator[Any]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, **_dialect(path))
        while True:
            first = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                where = f"line {first}" if rows.line_num == first else f"lines {first} to {rows.line_num}"
                yield ValueError(f"not CSV: {error} ({where})")
                continue
            yield row[position] if position < len(row) else ValueError(f"the row has {len(row)} columns")


def choose_column(path: Path, names: list[str], column: str | None) -> str:
    """The column asked for, or the one that holds texts by its name; ValueError lists what there is."""
    if column is None:
        found = [name for name in COLUMNS if name in names] or (names if len(names) == 1 else [])
        if found:
            return found[0]
        raise ValueError(f"{path}: which column holds the text? It has {', '.join(names)}")
    if column not in names:
        raise ValueError(f"{path}: there is no column {column!r}; it has {', '.join(names)}")
    return column


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"corpora need pyarrow: pip install 'pyglobenc[corpus]' ({error})") from error
    return pyarrow


def _folder(path: Path, column: str | None) -> Source:
    state, splits = path / "state.json", path / "dataset_dict.json"
    if splits.exists():
        names = ", ".join(json.loads(splits.read_bytes()).get("splits", ()))
        raise ValueError(f"{path}: holds several splits, choose one of its folders: {names}")
    if state.exists():
        files = tuple(path / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"])
        return _datasets(path, files, column)
    files = tuple(sorted(path.glob("*.parquet")))
    if not files:
        raise ValueError(f"{path}: neither a folder that datasets saved (no state.json) nor one of Parquet files")
    return _parquet(path, files, column)


def _parquet(path: Path, files: tuple[Path, ...], column: str | None) -> Source:
    parquet = _arrow().parquet
    with parquet.ParquetFile(files[0]) as first:
        name = choose_column(path, first.schema_arrow.names, column)

    def read() -> Iterator[Any]:
        for one in files:
            with parquet.ParquetFile(one) as file:
                for batch in file.iter_batches(columns=[name]):
                    yield from batch.column(0).to_pylist()

    return Source(path, name, files, read)


def _datasets(path: Path, files: tuple[Path, ...], column: str | None) -> Source:
    arrow = _arrow()
    with arrow.memory_map(str(files[0])) as memory, arrow.ipc.open_stream(memory) as stream:
        name = choose_column(path, stream.schema.names, column)

    def read() -> Iterator[Any]:
        for one in files:
            with arrow.memory_map(str(one)) as memory, arrow.ipc.open_stream(memory) as stream:
                for batch in stream:
                    yield from batch.column(name).to_pylist()

    return Source(path, name, files, read)

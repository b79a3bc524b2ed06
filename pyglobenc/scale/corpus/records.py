"""Reads the texts of a corpus file, one record at a time.

A record that can't be read is reported and doesn't stop the job.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pyglobenc.inputs.windows import MAX_CHARACTERS

# Column names that are tried in this order if the user names none.
COLUMNS = ("text", "sentence")
CHUNK = 1 << 20
# The types of Arrow whose values become a str or None.
TEXTS = ("string", "large_string", "string_view", "null")
# The first bytes of a file in UTF-16. A file in UTF-8 never begins with them.
UTF16 = (b"\xff\xfe", b"\xfe\xff")
# The most bytes in a line or in a string of a table. Longer ones are left out unread, so that none of them
# fills the memory.
LONGEST = 1 << 24
# How many records are looked at to see whether a column exists.
LOOKED_AT = 100
# How many strings of a table are copied at a time.
STRINGS = 256
TOO_LONG = ValueError(f"the text or its line is longer than {LONGEST >> 20} MiB")


@dataclass(frozen=True)
class Record:
    """One record of a corpus.

    Attributes:
        index: its number in the input, from 0.
        text: its text, or None if it can't be used.
        reason: the reason why there is no text, or None.
        kept: values of other columns by name, as strings; None where the record has none.
    """

    index: int
    text: str | None
    reason: str | None = None
    kept: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A corpus that can be read any number of times.

    Attributes:
        path: the file or folder. An address such as s3://bucket/folder gives a `upath.UPath`.
        column: name or number of the column that holds the texts; None for formats without columns.
        files: the files that hold the data.
        read: function of a file that starts over and yields a text for every record of it, or an exception
            with the reason why the record can't be read.
        most: the most characters a text may have. Longer texts are left out.
        listing: function that returns the files of a folder as they are now; None for a single file.
        kept: sources of other columns of the same file, whose values accompany the texts.
    """

    path: Path
    column: str | None
    files: tuple[Path, ...]
    read: Callable[[Path], Iterator[Any]]
    most: int = MAX_CHARACTERS
    listing: Callable[[], tuple[Path, ...]] | None = None
    kept: tuple["Source", ...] = ()

    def values(self, first: int = 0) -> Iterator[Any]:
        """Yield what `read` yields for each file from file number `first` on."""
        return chain.from_iterable(map(self.read, self.files[first:]))

    def records(self, start: int = 0, counts: Sequence[int] = ()) -> Iterator[Record]:
        """Yield the records from number `start` on, in input order.

        Args:
            start: number of the first record.
            counts: how many records the first files hold. The files before the one with record `start` are
                not read.
        """
        first, before = 0, 0
        while first < len(counts) and before + counts[first] <= start:
            before, first = before + counts[first], first + 1
        columns = [one.values(first) for one in (self, *self.kept)]
        # Columns of different lengths belong to a file that is being changed, which the job notices.
        rows = islice(zip(*columns, strict=False), start - before, None)
        names = [one.column for one in self.kept]
        for index, (text, *values) in enumerate(rows, start):
            yield make_record(index, text, dict(zip(names, values, strict=True)), self.most)

    def now(self) -> tuple[Path, ...]:
        """Return the files as they are now."""
        return self.listing() if self.listing else self.files

    def sha256(self) -> str:
        """Return the SHA-256 of the files' contents and order, as they are now. Names don't count."""
        return joined_sha256(map(file_sha256, self.now()))

    def places(self) -> list[Path]:
        """Return the file or folder, and the files, that an output on this machine must not touch."""
        return [place for place in (self.path, *self.files) if not is_address(place)]


def file_sha256(path: Path) -> bytes:
    """Return the SHA-256 of a file's content."""
    one = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            one.update(chunk)
    return one.digest()


def joined_sha256(digests: Iterable[bytes]) -> str:
    """Return the SHA-256 of several files, from the SHA-256 of each."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def is_address(path: Any) -> bool:
    """Tell whether a path is an address in an object store, such as s3://bucket/folder."""
    return "://" in str(path)


def _place(path: str | Path) -> Path:
    """Return the path of a local file or folder, or the `upath.UPath` of an address.

    Raises:
        ImportError: the package that reads addresses isn't installed.
    """
    if not is_address(path):
        return Path(path)
    try:
        from upath import UPath
    except ImportError as error:
        raise ImportError(
            f"{path}: addresses need universal-pathlib, which is not installed: pip install "
            f"universal-pathlib ({error})"
        ) from error
    place = UPath(path)
    return Path(place.path) if place.protocol in ("file", "local") else place


def digest(records: list[Record]) -> str:
    """Return the SHA-256 of the numbers and texts of some records.

    A record without a text counts as such.
    """
    total = hashlib.sha256()
    for record in records:
        text = None if record.text is None else record.text.encode()
        total.update(f"{record.index} {-1 if text is None else len(text)}\n".encode())
        total.update(text or b"")
    return total.hexdigest()


def make_record(index: int, text: Any, kept: dict[str, Any], most: int) -> Record:
    """Return the record of a text, or of an exception or other value that is no text.

    Args:
        index: number of the record.
        text: the text, or what came in its place.
        kept: values of other columns by name, of any type.
        most: the most characters a text may have.
    """
    reason = _reason(text, most)
    values = {name: _as_text(value) for name, value in kept.items()}
    return Record(index, None if reason else text, reason, values)


def _reason(text: Any, most: int) -> str | None:
    if isinstance(text, Exception):
        return " ".join(str(text).split()) or type(text).__name__
    if text is None:
        return "no text"
    if not isinstance(text, str):
        return f"the text must be a string, got {type(text).__name__}"
    if len(text) > most:
        return f"the text has {len(text)} characters and at most {most} are tokenized"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 text (at character {error.start})"
    return None if text.strip() else "empty text"


def _as_text(value: Any) -> str | None:
    """Return a value as a string, and as JSON if it is no string; None for a missing one."""
    if value is None or isinstance(value, Exception):
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode(errors="surrogateescape").decode(errors="replace")


def keep_columns(source: Source, names: Iterable[str], header: bool = True) -> Source:
    """Return a source whose records also hold the values of some columns.

    Args:
        source: the source of the texts.
        names: names of columns or keys; without a header their numbers.
        header: as for `open_source`.

    Raises:
        ValueError: there is no such column. For JSON the first objects count, since others may lack a key.
    """
    kept = []
    for name in dict.fromkeys(names):
        one = open_source(source.path, name, header, texts=False)
        first = list(islice(one.values(), LOOKED_AT))
        if first and all(isinstance(value, Exception) for value in first):
            raise ValueError(f"{source.path}: can't keep {name!r}: {first[0]}")
        kept.append(one)
    return replace(source, kept=tuple(kept))


def open_source(
    path: str | Path, column: str | None = None, header: bool = True, texts: bool = True
) -> Source:
    """Open a corpus by its suffix: .txt, .csv, .tsv, .jsonl, .parquet, or a folder.

    A folder holds Parquet files, or what `save_to_disk` of `datasets` has written.

    Args:
        path: the file or folder, or its address, such as s3://bucket/folder.
        column: name of the column or key that holds the text. None means "text", "sentence" or the only
            column; for JSON the keys of the first object count. Without a header it is a number.
        header: whether the first line of a .csv or .tsv names its columns.
        texts: refuse a column that doesn't hold texts. Without it `Source.read` yields values of any type,
            such as labels.

    Returns:
        Source of the texts.

    Raises:
        ValueError: the format is unknown, there is no such column, or the column doesn't hold texts.
        OSError: the file can't be read.
        ImportError: the package that reads addresses isn't installed.
    """
    path = _place(path)
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file or folder", str(path))
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder(path, column, texts)
    if not path.is_file():
        raise ValueError(f"{path}: a corpus is read more than once, so it must be a file or a folder")
    if suffix == ".parquet":
        return _table(path, (path,), column, _parquet, texts)
    with path.open("rb") as file:
        if file.read(2) in UTF16:
            raise ValueError(f"{path}: is UTF-16, not UTF-8")
    if suffix in (".txt", ".text", ""):
        if column is not None:
            raise ValueError(f"{path}: a text file has no columns, got {column!r}")
        return Source(path, None, (path,), _lines)
    if suffix in (".jsonl", ".ndjson", ".json"):
        key = column or _json_key(path)
        return Source(path, key, (path,), lambda file: (_json_text(line, key) for line in _lines(file)))
    if suffix in (".csv", ".tsv"):
        return _csv(path, column, header)
    raise ValueError(
        f"{path}: unknown format {suffix!r}; known: .txt, .csv, .tsv, .jsonl, .parquet, a folder that "
        f"datasets saved"
    )


def _lines(path: Path) -> Iterator[str | Exception]:
    """Yield lines without their ends.

    Bytes that aren't UTF-8 become surrogates, which `_reason` reports.
    """
    with path.open("rb") as file:
        for number, line in enumerate(_bounded(file, (b"\n",))):
            if line is None:
                yield TOO_LONG
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            yield line.decode("utf-8", errors="surrogateescape").rstrip("\r\n")


def _bounded(file: Any, ends: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the lines of a file with their ends, each of which is one of `ends`.

    A line longer than LONGEST yields None. No more than LONGEST of it is read at a time.
    """
    while line := file.readline(LONGEST):
        if len(line) < LONGEST or line.endswith(ends):
            yield line
            continue
        while len(line) == LONGEST and not line.endswith(ends):
            line = file.readline(LONGEST)
        yield None


def _json_key(path: Path) -> str:
    """Return the key under which the first object holds its text."""
    for number, line in enumerate(_lines(path)):
        if isinstance(line, Exception):
            continue
        if number == 0 and line.lstrip().startswith("["):
            raise ValueError(f"{path}: begins with a JSON array; each line must hold one object or string")
        value = _json(line)
        if isinstance(value, dict):
            return _likely(list(value)) or COLUMNS[0]
    return COLUMNS[0]


def _json(line: str | Exception) -> Any:
    """Return the value of a line, None for an empty line, or the exception that says what is wrong."""
    if isinstance(line, Exception):
        return line
    try:
        return json.loads(line) if line.strip() else None
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


def _json_text(line: str | Exception, key: str) -> Any:
    value = _json(line)
    if value is None or isinstance(value, str | Exception):
        return value
    if not isinstance(value, dict):
        return ValueError(
            f"a line must hold an object with the key {key!r}, or a string, got {type(value).__name__}"
        )
    if key not in value:
        return ValueError(f"no key {key!r}")
    return value[key]


def _csv(path: Path, column: str | None, header: bool) -> Source:
    # The csv module refuses fields larger than its own limit, which is 128 KiB by default.
    csv.field_size_limit(LONGEST)
    names = next(_rows(path), [])
    if isinstance(names, Exception):
        raise ValueError(f"{path}: the first row can't be read: {names}")
    # In a column's name, bytes that aren't UTF-8 are shown as U+FFFD.
    names = [name.encode(errors="surrogateescape").decode(errors="replace") for name in names]
    if not names:
        raise ValueError(f"{path}: the first row is empty")
    if header:
        column = choose_column(path, names, column)
        position = names.index(column)
    else:
        column = column or "0"
        if not column.isdecimal() or int(column) >= len(names):
            raise ValueError(
                f"{path}: without a header the column is a number below {len(names)}, got {column!r}"
            )
        position = int(column)

    def read(file: Path) -> Iterator[Any]:
        for row in islice(_rows(file), int(header), None):
            if isinstance(row, Exception):
                yield row
            else:
                yield row[position] if position < len(row) else ValueError(f"the row has {len(row)} columns")

    return Source(path, column, (path,), read)


def _dialect(path: Path) -> dict[str, Any]:
    # Tab-separated files have no quoting, so a lone quote in a text doesn't swallow the lines after it.
    # In other files `strict` makes the csv module report a quote that is never closed.
    return (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {"strict": True}
    )


def _rows(path: Path) -> Iterator[list[str] | Exception]:
    too_long = []

    def lines(file: Any) -> Iterator[str]:
        for line in _bounded(file, ("\n", "\r")):
            if line is None:
                too_long.append(TOO_LONG)
            yield line or ""

    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(lines(file), **_dialect(path))
        while True:
            first = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                where = f"line {first}" if rows.line_num == first else f"lines {first} to {rows.line_num}"
                row = ValueError(f"not CSV: {error} ({where})")
            yield too_long.pop() if too_long else row
            too_long.clear()


def choose_column(path: str | Path, names: list[str], column: str | None) -> str:
    """Return the column that was asked for, or the one whose name says that it holds texts.

    Raises:
        ValueError: there is no such column. The message lists those that there are.
    """
    # The first line of a file without column names holds a text.
    other = (
        "; if the first line is a record, give --no-header --column 0"
        if str(path).lower().endswith((".csv", ".tsv"))
        else ""
    )
    if column is None:
        column = _likely(names)
        if column is None:
            raise ValueError(f"{path}: name the column that holds the text, one of {', '.join(names)}{other}")
    if column not in names:
        raise ValueError(f"{path}: there is no column {column!r}; it has {', '.join(names)}{other}")
    return column


def _likely(names: list[str]) -> str | None:
    found = [name for name in COLUMNS if name in names] or (names if len(names) == 1 else [])
    return found[0] if found else None


def load_arrow() -> Any:
    """Return pyarrow, with the modules that are used here.

    Raises:
        ImportError: pyarrow isn't installed. The message gives the command that installs it.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"corpora need pyarrow, which is not installed: pip install pyarrow ({error})"
        ) from error
    return pyarrow


def _folder(path: Path, column: str | None, texts: bool) -> Source:
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise ValueError(f"{path}: holds several splits, choose one of its folders: {splits}")
    saved = (path / "state.json").exists()

    def listing() -> tuple[Path, ...]:
        return _saved_files(path) if saved else tuple(sorted(path.glob("*.parquet")))

    files = listing()
    if not files:
        raise ValueError(
            f"{path}: neither a folder that datasets saved (no state.json) nor one of Parquet files"
        )
    return replace(_table(path, files, column, _stream if saved else _parquet, texts), listing=listing)


def _saved_files(path: Path) -> tuple[Path, ...]:
    """Return the files that `save_to_disk` of datasets has listed."""
    state = path / "state.json"
    try:
        files = tuple(path / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state}: doesn't list the files of the data as `datasets` writes them") from error
    if not files:
        raise ValueError(f"{path}: holds no record")
    return files


@contextmanager
def _parquet(path: Path) -> Iterator[tuple[Any, Callable[[str], Iterable[Any]]]]:
    with path.open("rb") as handle, load_arrow().parquet.ParquetFile(handle) as file:
        yield file.schema_arrow, lambda name: file.iter_batches(STRINGS, columns=[name])


@contextmanager
def _stream(path: Path) -> Iterator[tuple[Any, Callable[[str], Iterable[Any]]]]:
    arrow = load_arrow()
    # The file isn't mapped into memory: if it were cut while it is read, the process would end.
    opened = path.open("rb") if is_address(path) else arrow.OSFile(str(path))
    with opened as file, arrow.ipc.open_stream(file) as stream:
        yield stream.schema, lambda name: stream


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Context that adds the file's name to errors of Arrow, which don't contain it."""
    try:
        yield
    except (load_arrow().ArrowException, OSError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from error


def _table(
    path: Path, files: tuple[Path, ...], column: str | None, contents: Callable[[Path], Any], texts: bool
) -> Source:
    """Return the source that reads one column of some files.

    `contents` opens a file as a context and gives its schema and a function that yields batches of a column.
    """
    with _named(files[0]), contents(files[0]) as (schema, _):
        name = choose_column(path, schema.names, column)

    def read(file: Path) -> Iterator[Any]:
        with _named(file), contents(file) as (schema, batches):
            choose_column(file, schema.names, name)
            if texts:
                check_texts(file, schema.field(schema.names.index(name)))
            for batch in batches(name):
                values = batch.column(batch.schema.names.index(name))
                yield from _strings(values) if texts else values.to_pylist()

    return Source(path, name, files, read)


def _strings(column: Any) -> Iterator[Any]:
    """Yield the texts of a column, and copy only a few at a time.

    Bytes that aren't UTF-8 become surrogates, which `_reason` reports.
    """
    arrow = load_arrow()
    for start in range(0, len(column), STRINGS):
        some = column.slice(start, STRINGS)
        some = some.dictionary_decode() if hasattr(some.type, "index_type") else some
        # The values are read as bytes, since a string of Arrow must be UTF-8.
        some = some.cast(arrow.large_binary())
        some.validate(full=True)
        for scalar in some:
            if not scalar.is_valid:
                yield None
            elif scalar.as_buffer().size > LONGEST:
                yield TOO_LONG
            else:
                yield scalar.as_py().decode("utf-8", errors="surrogateescape")


def check_texts(path: str | Path, column: Any) -> None:
    """Raise ValueError if a column of a table, given by its field, doesn't hold strings."""
    # In a dictionary type, the type of the values counts.
    kind = column.type.value_type if hasattr(column.type, "index_type") else column.type
    if str(kind) not in TEXTS:
        raise ValueError(f"{path}: the column {column.name!r} must hold strings, it holds {kind}")

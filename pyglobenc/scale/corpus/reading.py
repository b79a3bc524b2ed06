"""Reads a corpus shard by shard, all of it or some successive shards.

Nothing here imports torch or transformers, so that a process that only reads starts at once.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from pyglobenc.scale.corpus.records import Record, Source, digest, load_arrow
from pyglobenc.scale.corpus.shards import Part


@dataclass(frozen=True)
class Survey:
    """What an input holds: the SHA-256 of its files and the records of every shard."""

    sha256: str
    parts: tuple[Part, ...]

    @property
    def records(self) -> int:
        """Return the number of records."""
        return sum(part.records for part in self.parts)

    @property
    def texts(self) -> str:
        """Return the SHA-256 of all records' texts."""
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()


class InputChanged(ValueError):
    """The input has changed since the job began."""

    @classmethod
    def of(cls, source: Source) -> InputChanged:
        """Return the error of a source."""
        return cls(
            f"{source.path}: changed while the job ran, so the output isn't complete; start again once "
            f"it no longer changes"
        )


def survey_source(source: Source, shard_size: int) -> Survey:
    """Read a corpus once, to find its shards and to notice later if it changes.

    Args:
        source: the corpus.
        shard_size: number of records in a shard.

    Returns:
        Survey of the corpus.
    """
    sha256 = source.sha256()
    parts = [part_of(number, records) for number, records in read_shards(source, shard_size)]
    return Survey(sha256, tuple(parts))


def read_shards(
    source: Source, size: int, first: int = 0, counts: Sequence[int] = ()
) -> Iterator[tuple[int, list[Record]]]:
    """Yield the number and the records of the shards from `first` on; counts as for `Source.records`."""
    records = source.records(first * size, counts)
    while shard := list(islice(records, size)):
        yield first, shard
        first += 1


def part_of(number: int, records: list[Record]) -> Part:
    """Return what a survey keeps of a shard's records."""
    return Part(number, records[0].index, len(records), digest(records))


def count_records(source: Source, path: Path) -> int:
    """Return the number of records of one file."""
    return sum(1 for _ in source.read(path))


def shards_by_file(counts: Sequence[int], size: int) -> list[range]:
    """Return the numbers of the shards that begin in each file, for files of `counts` records."""
    ends = [-(-end // size) for end in accumulate(counts, initial=0)]
    return [range(*pair) for pair in zip(ends, ends[1:], strict=False)]


def survey_shards(source: Source, size: int, counts: Sequence[int], shards: range) -> list[Part]:
    """Return what a survey keeps of some successive shards; counts as for `Source.records`."""
    found = islice(read_shards(source, size, shards.start, counts), len(shards))
    return [part_of(number, records) for number, records in found]


def read_parts(
    source: Source, size: int, counts: Sequence[int], parts: Sequence[Part]
) -> Iterator[tuple[Part, list[Record]]]:
    """Yield some shards of a survey, in their order, with their records.

    Raises:
        InputChanged: the records aren't those of the survey.
    """
    left = {part.shard: part for part in parts}
    for number, records in read_shards(source, size, min(left), counts):
        if number in left:
            part = left.pop(number)
            if part_of(number, records) != part:
                raise InputChanged.of(source)
            yield part, records
        if not left:
            return
    raise InputChanged.of(source)


def read_batch(batch: dict[str, Any], source: Source, size: int, counts: Sequence[int]) -> Iterator[Any]:
    """Yield what `read_parts` yields as rows, for `ray.data.Dataset.map_batches`.

    Args:
        batch: a row with the parts.
        source, size, counts: as for `read_parts`.

    Yields:
        A row for each shard. If the input can't be read or has changed, the last row holds the exception.
    """
    try:
        yield from map(to_row, read_parts(source, size, counts, from_row(batch)))
    except Exception as error:
        yield to_row(error)


def to_row(value: Any) -> Any:
    """Return a table of one row that holds a value of any type, in which exceptions can travel too.

    Ray Data raises the exceptions of its workers without their type.
    """
    arrow = load_arrow()
    data = pickle.dumps(value)
    if isinstance(value, Exception):
        try:
            pickle.loads(data)
        except Exception:
            data = pickle.dumps(RuntimeError(f"{type(value).__name__}: {value}"))
    return arrow.table({"value": arrow.array([data], arrow.large_binary())})


def from_row(batch: dict[str, Any]) -> Any:
    """Return the value in a row."""
    return pickle.loads(batch["value"][0])

"""A job over a corpus: its shards, in length-bucketed batches, whichever of them are still to be done.

Shard s holds records s*size to (s+1)*size - 1 and is computed as if it were alone, so that neither the number
of ranks nor a stop in between changes what is in it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pyglobenc.common.files import check_apart
from pyglobenc.inputs.batches import Runner, check_target, longest
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.windows import MAX_CHARACTERS, Encoded, encode, most_characters
from pyglobenc.scale.corpus.records import Record, Source, digest
from pyglobenc.scale.corpus.shards import (
    MISSING,
    Part,
    locked,
    look_at_shard,
    rejected_path,
    remove_temporary,
    shard_path,
    write_shard,
)

log = logging.getLogger("pyglobenc")

# words of the text that settings are tried on, at most, where the model sets no limit
TRIED = 1024


@dataclass(frozen=True)
class Survey:
    """What an input holds: the SHA-256 of its files and the records of every shard."""

    sha256: str
    parts: tuple[Part, ...]

    @property
    def records(self) -> int:
        """How many records there are."""
        return sum(part.records for part in self.parts)

    @property
    def texts(self) -> str:
        """SHA-256 of all records' texts."""
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What a job does.

    Attributes:
        source: the corpus.
        folder: of the output.
        shard_size: records a shard.
        batch_tokens: most tokens, padding included, that the model sees at once, unless one text has more.
        common: what every shard says of itself: method, model fingerprint, dtype, settings.
        rank, world: this process among those that share the job.
        survey: of the source; None to read it first.
    """

    source: Source
    folder: Path
    shard_size: int
    batch_tokens: int
    common: dict[str, Any]
    rank: int = 0
    world: int = 1
    survey: Survey | None = None


@dataclass
class Summary:
    """Records of this run: attributed, left out, and found done before, of which some were left out; and
    seconds.
    """

    attributed: int = 0
    rejected: int = 0
    before: int = 0
    before_rejected: int = 0
    seconds: float = 0.0


class InputChanged(ValueError):
    """The input isn't what it was when the job began."""

    def __init__(self, source: Source):
        super().__init__(
            f"{source.path}: changed while the job ran, so nothing is complete; start again when it stays "
            f"as it is"
        )


def survey_source(source: Source, shard_size: int) -> Survey:
    """Read a corpus once, to know its shards and to notice later on if it changes."""
    sha256 = source.sha256()
    parts = [
        Part(number, records[0].index, len(records), digest(records))
        for number, records in _shards(source, shard_size)
    ]
    return Survey(sha256, tuple(parts))


def run_job(runner: Runner, plan: Plan, progress: Callable[[int], None]) -> Summary:
    """Do this rank's shards that aren't there yet; progress is called with the number of records that were
    dealt with.

    A shard that another process computes is passed over at first and waited for at the end.

    Raises:
        ValueError: the output lies in the input or in the model's folder.
        InputChanged: the input changed since it was surveyed; shards that are there are of what it was.
        OSError: a shard can't be written.
    """
    model = runner.model.name_or_path
    kept = [
        plan.source.path,
        *plan.source.files,
        *([model] if os.path.isfile(os.path.join(model, "config.json")) else []),
    ]
    check_apart(plan.folder, kept)
    summary, start = Summary(), time.perf_counter()
    survey = plan.survey or survey_source(plan.source, plan.shard_size)
    plan = replace(plan, survey=survey)
    mine = {part.shard for part in survey.parts if part.shard % plan.world == plan.rank}
    busy = _do(runner, plan, mine, False, summary, progress)
    if busy:
        _do(runner, plan, busy, True, summary, progress)
    if plan.source.sha256() != survey.sha256:
        raise InputChanged(plan.source)
    summary.seconds = time.perf_counter() - start
    return summary


def _do(
    runner: Runner,
    plan: Plan,
    numbers: set[int],
    wait: bool,
    summary: Summary,
    progress: Callable[[int], None],
) -> set[int]:
    """Do some shards; returns the numbers of those that other processes are at work on, unless they are
    waited for.
    """
    busy, seen = set(), 0
    for number, records in _shards(plan.source, plan.shard_size):
        seen += 1
        if number not in numbers:
            continue
        part = plan.survey.parts[number]
        if digest(records) != part.sha256:
            raise InputChanged(plan.source)
        if _is_done(plan, part, summary, progress):
            continue
        with locked(plan.folder, f"{number:06d}", wait) as held:
            if not held:
                busy.add(number)
            # whoever held the lock may have written the shard
            elif not _is_done(plan, part, summary, progress, tell=True):
                remove_temporary(shard_path(plan.folder, number), rejected_path(plan.folder, number))
                rows, rejected = attribute_records(runner, records, plan.batch_tokens, progress)
                write_shard(plan.folder, part, rows, rejected, plan.common)
                summary.attributed += len(rows)
                summary.rejected += len(rejected)
    if seen != len(plan.survey.parts):
        raise InputChanged(plan.source)
    return busy


def _is_done(
    plan: Plan, part: Part, summary: Summary, progress: Callable[[int], None], tell: bool = False
) -> bool:
    """Whether a shard is there and complete, counted if it is; tell: say why one that is there will be
    computed again.
    """
    found = look_at_shard(plan.folder, part, plan.common)
    if found.lacks is None:
        summary.before += part.records
        summary.before_rejected += part.records - found.rows
        progress(part.records)
    elif tell and found.lacks != MISSING:
        log.warning("%s is computed again: %s", shard_path(plan.folder, part.shard).name, found.lacks)
    return found.lacks is None


def _shards(source: Source, size: int) -> Iterator[tuple[int, list[Record]]]:
    records, number = source.records(), 0
    while shard := list(islice(records, size)):
        yield number, shard
        number += 1


def try_settings(runner: Runner) -> None:
    """Run one short text, so that what is wrong with all of them isn't taken for each record's own fault.

    Raises:
        ValueError: the method refuses the model or the settings, whatever the text.
    """
    limit = longest(runner.model, runner.tokenizer, runner.options.max_length)
    words = min(abs(runner.options.target or 0) + 1, limit or TRIED)
    one = encode(runner.tokenizer, "a " * words, "a text", limit, "truncate", runner.options.stride)
    try:
        check_target(runner, one, "a text")
    except ValueError:
        if runner.method.target == "class":
            raise
        # some records may be long enough to hold it
        return
    list(runner.run([one]))


def attribute_records(
    runner: Runner,
    records: list[Record],
    batch_tokens: int,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Attributions of some records and what was left out, both in input order, as `write_shard` takes
    them.
    """
    rows, rejected = [], []
    for portion in _portions(records):
        texts, refused = encode_records(runner, portion)
        rejected += refused
        progress(len(refused))
        for bucket in buckets(texts, batch_tokens):
            for index, text, fields in _attribute(runner, bucket, batch_tokens):
                if isinstance(fields, ValueError):
                    rejected.append({"index": index, "reason": " ".join(str(fields).split())})
                else:
                    rows.append(
                        {"index": index, "text": text.text, "tokens": text.tokens, "cut": text.cut} | fields
                    )
            progress(len(bucket))
    return sorted(rows, key=lambda row: row["index"]), sorted(rejected, key=lambda entry: entry["index"])


def _portions(records: list[Record]) -> Iterator[list[Record]]:
    """Records in portions of no more characters than one text may have, since only so many are tokenized at a
    time.
    """
    portion: list[Record] = []
    size = 0
    for record in records:
        more = len(record.text or "")
        if portion and size + more > MAX_CHARACTERS:
            yield portion
            portion, size = [], 0
        portion.append(record)
        size += more
    if portion:
        yield portion


def encode_records(
    runner: Runner, records: list[Record]
) -> tuple[list[tuple[int, Encoded]], list[dict[str, Any]]]:
    """Tokens of the records that have some, with their numbers, and what was left out."""
    options, texts, rejected = runner.options, [], []
    limit = longest(runner.model, runner.tokenizer, options.max_length)
    for record in records:
        try:
            if record.reason is not None:
                raise ValueError(record.reason)
            text = encode(runner.tokenizer, record.text, "the text", limit, options.long, options.stride)
            check_target(runner, text, "the text")
            texts.append((record.index, text))
        except ValueError as error:
            rejected.append({"index": record.index, "reason": str(error).removeprefix("explain: ")})
    return texts, rejected


def buckets(texts: list[tuple[int, Encoded]], batch_tokens: int) -> Iterator[list[tuple[int, Encoded]]]:
    """Texts of like length together: at most batch_tokens tokens with the padding, unless one text has
    more.
    """
    bucket: list[tuple[int, Encoded]] = []
    windows = 0
    for item in sorted(texts, key=lambda item: (len(item[1].windows[0]), item[0])):
        width, more = len(item[1].windows[0]), len(item[1].windows)
        if bucket and (windows + more) * width > batch_tokens:
            yield bucket
            bucket, windows = [], 0
        bucket.append(item)
        windows += more
    if bucket:
        yield bucket


def batch_shapes(
    runner: Runner, source: Source, shard_size: int, batch_tokens: int
) -> Iterator[tuple[int, int, int]]:
    """Of every batch of a job its size B, its tokens n and the texts whose windows it holds; (0, 0, count)
    for records left out.
    """
    for portion in (portion for _, records in _shards(source, shard_size) for portion in _portions(records)):
        texts, rejected = encode_records(runner, portion)
        yield 0, 0, len(rejected)
        for bucket in buckets(texts, batch_tokens):
            width, windows = (
                max(len(text.windows[0]) for _, text in bucket),
                sum(len(text.windows) for _, text in bucket),
            )
            yield min(windows, max(1, batch_tokens // width)), width, len(bucket)


def _attribute(
    runner: Runner, bucket: list[tuple[int, Encoded]], batch_tokens: int
) -> Iterator[tuple[int, Encoded, dict[str, Any] | ValueError]]:
    """Fields of each text; where the method refuses a batch, its texts are tried alone and the culprits'
    errors returned.
    """
    width = max(len(window) for _, text in bucket for window in text.windows)
    runner.options = replace(runner.options, batch_size=max(1, batch_tokens // width))
    try:
        done: list[Any] = list(runner.run([text for _, text in bucket]))
    except ValueError as error:
        alone = [] if len(bucket) == 1 else bucket
        done = [fields for item in alone for _, _, fields in _attribute(runner, [item], batch_tokens)] or [
            error
        ]
    for (index, text), fields in zip(bucket, done, strict=True):
        yield index, text, fields


def most_of_a_text(runner: Runner) -> int:
    """Characters of a record, at most, for it to be tokenized."""
    options = runner.options
    return most_characters(longest(runner.model, runner.tokenizer, options.max_length), options.long)


def make_runner(model: Any, tokenizer: Any, **options: Any) -> Runner:
    """A method ready to run; options as of `pyglobenc.explain`."""
    return Runner(model, tokenizer, Options(**options))

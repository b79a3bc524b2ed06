"""A job over a corpus: its shards, in length-bucketed batches, whichever of them are still to be done.

Shard s holds records s*size to (s+1)*size - 1 and is computed as if it were alone, so that neither the number of ranks nor a stop in
between changes what is in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pyglobenc.batches import Runner, check_target, longest
from pyglobenc.corpus.records import Record, Source
from pyglobenc.corpus.shards import shard_path, write_shard
from pyglobenc.explain import Options
from pyglobenc.windows import Encoded, encode

# words of the text that settings are tried on, at most, where the model sets no limit
TRIED = 1024

try:
    import fcntl
except ImportError:
    # Windows: nothing keeps a second job out
    fcntl = None


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
    """

    source: Source
    folder: Path
    shard_size: int
    batch_tokens: int
    common: dict[str, Any]
    rank: int = 0
    world: int = 1


@dataclass
class Summary:
    """Records of this run: attributed, left out, found done before; and seconds."""

    attributed: int = 0
    rejected: int = 0
    before: int = 0
    seconds: float = 0.0


def run_job(runner: Runner, plan: Plan, progress: Callable[[int], None]) -> Summary:
    """Do this rank's shards that aren't there yet; progress is called with the number of records that were dealt with.

    Raises:
        OSError: a shard can't be written, or another process does this rank's share.
    """
    summary, start = Summary(), time.perf_counter()
    with _alone(plan):
        for number, records in _shards(plan):
            if number % plan.world != plan.rank:
                continue
            if shard_path(plan.folder, number).exists():
                summary.before += len(records)
                progress(len(records))
                continue
            rows, rejected = attribute_records(runner, records, plan.batch_tokens, progress)
            write_shard(plan.folder, number, rows, rejected, plan.common)
            summary.attributed += len(rows)
            summary.rejected += len(rejected)
    summary.seconds = time.perf_counter() - start
    return summary


def _shards(plan: Plan) -> Iterator[tuple[int, list[Record]]]:
    records, number = plan.source.records(), 0
    while shard := list(islice(records, plan.shard_size)):
        yield number, shard
        number += 1


@contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """Keep a second job out of this rank's shards; the system lets go of the lock when the process ends, however it ends."""
    with open(plan.folder / f".lock-{plan.rank}", "wb") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, "another process is at work on this job", str(plan.folder)) from error
        except OSError:
            # file systems without locks: shards are still written whole
            pass
        yield
    with suppress(OSError):
        os.unlink(file.name)


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
    runner: Runner, records: list[Record], batch_tokens: int, progress: Callable[[int], None] = lambda count: None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Attributions of some records and what was left out, both in input order, as `write_shard` takes them."""
    texts, rejected = encode_records(runner, records)
    progress(len(rejected))
    rows = []
    for bucket in buckets(texts, batch_tokens):
        for index, text, fields in _attribute(runner, bucket, batch_tokens):
            if isinstance(fields, ValueError):
                rejected.append({"index": index, "reason": " ".join(str(fields).split())})
            else:
                rows.append({"index": index, "text": text.text, "tokens": text.tokens, "cut": text.cut} | fields)
        progress(len(bucket))
    return sorted(rows, key=lambda row: row["index"]), sorted(rejected, key=lambda entry: entry["index"])


def encode_records(runner: Runner, records: list[Record]) -> tuple[list[tuple[int, Encoded]], list[dict[str, Any]]]:
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
    """Texts of like length together: at most batch_tokens tokens with the padding, unless one text has more."""
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


def batch_shapes(runner: Runner, source: Source, shard_size: int, batch_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Of every batch of a job its size B, its tokens n and the texts whose windows it holds; (0, 0, count) for records left out."""
    records = source.records()
    while shard := list(islice(records, shard_size)):
        texts, rejected = encode_records(runner, shard)
        yield 0, 0, len(rejected)
        for bucket in buckets(texts, batch_tokens):
            width, windows = max(len(text.windows[0]) for _, text in bucket), sum(len(text.windows) for _, text in bucket)
            yield min(windows, max(1, batch_tokens // width)), width, len(bucket)


def _attribute(
    runner: Runner, bucket: list[tuple[int, Encoded]], batch_tokens: int
) -> Iterator[tuple[int, Encoded, dict[str, Any] | ValueError]]:
    """Fields of each text; where the method refuses a batch, its texts are tried alone and the culprits' errors returned."""
    width = max(len(window) for _, text in bucket for window in text.windows)
    runner.options = replace(runner.options, batch_size=max(1, batch_tokens // width))
    try:
        done: list[Any] = list(runner.run([text for _, text in bucket]))
    except ValueError as error:
        alone = [] if len(bucket) == 1 else bucket
        done = [fields for item in alone for _, _, fields in _attribute(runner, [item], batch_tokens)] or [error]
    for (index, text), fields in zip(bucket, done, strict=True):
        yield index, text, fields


def make_runner(model: Any, tokenizer: Any, **options: Any) -> Runner:
    """A method ready to run; options as of `pyglobenc.explain`."""
    return Runner(model, tokenizer, Options(**options))

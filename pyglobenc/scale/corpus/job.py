"""A job over a corpus: it computes the shards that are still missing, in batches of texts of like length.

Shard s holds records s*size to (s+1)*size - 1 and is computed as if it were the only one. So its content
depends neither on the number of processes nor on whether the job was stopped in between.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyglobenc._version import __version__
from pyglobenc.common.files import check_apart
from pyglobenc.inputs.batches import Runner, check_target, longest
from pyglobenc.inputs.batching import buckets, portions
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.windows import MAX_CHARACTERS, Encoded, encode, most_characters
from pyglobenc.scale.corpus.manifest import model_fingerprint, tokenizer_fingerprint
from pyglobenc.scale.corpus.reading import InputChanged, Survey, part_of, read_shards, survey_source
from pyglobenc.scale.corpus.records import Record, Source
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

# The most words in the text that settings are tried on, if the model sets no limit.
TRIED = 1024
# The most tokens in a batch by default. So many stay in a CPU's caches. With 4,096, MiniLM takes a fifth
# longer on one core.
CPU_TOKENS, GPU_TOKENS = 1024, 16384


@dataclass(frozen=True)
class Plan:
    """The plan of a job.

    Attributes:
        source: the corpus.
        folder: folder of the output.
        shard_size: number of records in a shard.
        batch_tokens: the most tokens, with padding, that the model gets at once. One text may have more.
        common: what every shard stores: method, model fingerprint, dtype and settings.
        survey: survey of the source, or None to read the source first.
    """

    source: Source
    folder: Path
    shard_size: int
    batch_tokens: int
    common: dict[str, Any]
    survey: Survey | None = None


@dataclass
class Summary:
    """Counts of a run.

    Attributes:
        attributed: number of records attributed in this run.
        rejected: number of records that this run left out.
        before: number of records in shards that were complete before this run.
        before_rejected: how many of these were left out.
        seconds: duration of the run.
    """

    attributed: int = 0
    rejected: int = 0
    before: int = 0
    before_rejected: int = 0
    seconds: float = 0.0


class LocalEngine:
    """Computes a job in this process, which may share the output with other processes of the same job.

    Args:
        loading: arguments of `load_runner`.
    """

    def __init__(self, loading: dict[str, Any]):
        self.runner = load_runner(**loading)

    def facts(self) -> dict[str, Any]:
        """Try the settings and return what `runner_facts` returns."""
        try_settings(self.runner)
        return runner_facts(self.runner)

    def survey(self, source: Source, shard_size: int) -> Survey:
        """Return the survey of a corpus."""
        return survey_source(source, shard_size)

    def run(self, plan: Plan, progress: Callable[[int], None]) -> Summary:
        """Compute the shards that aren't complete yet, as `run_job` does."""
        return run_job(self.runner, plan, progress)


def run_job(runner: Runner, plan: Plan, progress: Callable[[int], None]) -> Summary:
    """Compute the shards that aren't complete yet.

    A shard that another process computes is skipped at first, and waited for at the end.

    Args:
        runner: the method that is run.
        plan: the plan of the job.
        progress: called with a number of records whenever that many have been dealt with.

    Returns:
        Summary of this run.

    Raises:
        ValueError: the output would overwrite the input or the model's folder.
        InputChanged: the input changed since it was surveyed. Shards that were written hold its old content.
        OSError: a shard can't be written.
    """
    model = runner.model.name_or_path
    kept = [
        *plan.source.places(),
        *([model] if os.path.isfile(os.path.join(model, "config.json")) else []),
    ]
    check_apart(plan.folder, kept)
    summary, start = Summary(), time.perf_counter()
    survey = plan.survey or survey_source(plan.source, plan.shard_size)
    plan = replace(plan, survey=survey)
    every = {part.shard for part in survey.parts}
    busy = _do(runner, plan, every, False, summary, progress)
    if busy:
        _do(runner, plan, busy, True, summary, progress)
    if plan.source.sha256() != survey.sha256:
        raise InputChanged.of(plan.source)
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
    """Compute some shards.

    Returns:
        The numbers of the shards that other processes are computing, unless `wait` says to wait for them.
    """
    busy, seen = set(), 0
    for number, records in read_shards(plan.source, plan.shard_size):
        seen += 1
        if number not in numbers:
            continue
        part = plan.survey.parts[number]
        if part_of(number, records) != part:
            raise InputChanged.of(plan.source)
        if is_done(plan, part, summary, progress):
            continue
        if not compute_shard(runner, plan, part, records, wait, summary, progress):
            busy.add(number)
    if seen != len(plan.survey.parts):
        raise InputChanged.of(plan.source)
    return busy


def compute_shard(
    runner: Runner,
    plan: Plan,
    part: Part,
    records: list[Record],
    wait: bool,
    summary: Summary,
    progress: Callable[[int], None] = lambda count: None,
) -> bool:
    """Compute and write one shard, unless it is complete.

    Args:
        runner, plan, progress: as for `run_job`. The survey of the plan isn't used.
        part: what the survey keeps of the records.
        records: the records of the shard.
        wait: whether to wait while another process computes the shard.
        summary: counts, to which those of the shard are added.

    Returns:
        False if another process computes the shard, True if it is complete.

    Raises:
        OSError: the shard can't be written.
    """
    with locked(plan.folder, f"{part.shard:06d}", wait) as held:
        # The process that held the lock may have written the shard.
        if held and not is_done(plan, part, summary, progress, tell=True):
            remove_temporary(shard_path(plan.folder, part.shard), rejected_path(plan.folder, part.shard))
            rows, rejected = attribute_records(runner, records, plan.batch_tokens, progress)
            found = sorted(entry["index"] for entry in (*rows, *rejected))
            assert found == list(range(part.first, part.first + part.records)), "each record once"
            write_shard(plan.folder, part, rows, rejected, plan.common)
            summary.attributed += len(rows)
            summary.rejected += len(rejected)
    return held


def is_done(
    plan: Plan, part: Part, summary: Summary, progress: Callable[[int], None], tell: bool = False
) -> bool:
    """Tell whether a shard is complete, and count it if it is.

    With `tell`, the reason why an existing shard will be computed again is logged.
    """
    found = look_at_shard(plan.folder, part, plan.common)
    if found.lacks is None:
        summary.before += part.records
        summary.before_rejected += part.records - found.rows
        progress(part.records)
    elif tell and found.lacks != MISSING:
        log.warning("%s is computed again: %s", shard_path(plan.folder, part.shard).name, found.lacks)
    return found.lacks is None


def try_settings(runner: Runner) -> None:
    """Run one short text, to find errors that concern all texts before any record is blamed for them.

    Raises:
        ValueError: the method refuses the model or the settings for every text.
    """
    limit = longest(runner.model, runner.tokenizer, runner.options.max_length)
    far = runner.options.target if isinstance(runner.options.target, int) else 0
    words = min(abs(far) + 1, limit or TRIED)
    text = runner.tokenizer.mask_token if runner.fills_mask else "a " * words
    one = encode(runner.tokenizer, text, "a text", limit, "truncate", runner.options.stride)
    try:
        check_target(runner, one, "a text")
    except ValueError:
        if runner.method.target == "class":
            raise
        # Some records may be long enough to hold this position.
        return
    list(runner.run([one]))


def attribute_records(
    runner: Runner,
    records: list[Record],
    batch_tokens: int,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Attribute some records.

    Args:
        runner: the method that is run.
        records: the records.
        batch_tokens: the most tokens, with padding, that the model gets at once.
        progress: called with a number of records whenever that many have been dealt with.

    Returns:
        The rows of the attributed records and the entries of those that were left out. Both are in input
        order, in the form that `write_shard` takes.
    """
    rows, rejected = [], []
    kept = {record.index: {"input": record.kept} for record in records if record.kept}
    for portion in _portions_of_text(records):
        texts, refused = encode_records(runner, portion)
        rejected += refused
        progress(len(refused))
        for bucket in buckets(texts, batch_tokens):
            for index, text, fields in _attribute(runner, bucket, batch_tokens):
                if isinstance(fields, ValueError):
                    rejected.append({"index": index, "reason": " ".join(str(fields).split())})
                else:
                    own = {"index": index, "text": text.text, "tokens": text.tokens, "cut": text.cut}
                    rows.append(own | fields | kept.get(index, {}))
            progress(len(bucket))
    return sorted(rows, key=lambda row: row["index"]), sorted(rejected, key=lambda entry: entry["index"])


def _portions_of_text(records: list[Record]) -> Iterator[list[Record]]:
    """Yield records with no more characters than one text may have, so that little is tokenized at once."""
    return portions(records, lambda record: len(record.text or ""), MAX_CHARACTERS)


def encode_records(
    runner: Runner, records: list[Record]
) -> tuple[list[tuple[int, Encoded]], list[dict[str, Any]]]:
    """Tokenize records.

    Returns:
        The number and tokens of each record that has a text, and an entry with the index and reason of each
        record that was left out.
    """
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


def batch_shapes(
    runner: Runner, source: Source, shard_size: int, batch_tokens: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (B, n, count) for every batch of a job: its size, its padded length and its number of texts.

    For records that are left out (0, 0, count) is yielded.
    """
    for portion in (
        portion for _, records in read_shards(source, shard_size) for portion in _portions_of_text(records)
    ):
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
    """Yield the fields of each text of a bucket.

    If the method refuses the batch, each text is tried alone. A text that is refused alone gets its error.
    """
    width = max(len(window) for _, text in bucket for window in text.windows)
    runner.options = replace(runner.options, batch_size=max(1, batch_tokens // width))
    try:
        names = [f"record {index}" for index, _ in bucket]
        done: list[Any] = list(runner.run([text for _, text in bucket], names=names))
    except ValueError as error:
        alone = [] if len(bucket) == 1 else bucket
        done = [fields for item in alone for _, _, fields in _attribute(runner, [item], batch_tokens)] or [
            error
        ]
    for (index, text), fields in zip(bucket, done, strict=True):
        yield index, text, fields


def most_of_a_text(runner: Runner) -> int:
    """Return the number of characters above which a record isn't tokenized."""
    options = runner.options
    return most_characters(longest(runner.model, runner.tokenizer, options.max_length), options.long)


def make_runner(model: Any, tokenizer: Any, **options: Any) -> Runner:
    """Return a runner of a method, with the options that `pyglobenc.explain` takes."""
    return Runner(model, tokenizer, Options(**options))


def load_runner(
    model: str,
    model_dtype: Any = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    method: str = "globenc",
    **options: Any,
) -> Runner:
    """Load a model by its name and return a runner of a method.

    Args:
        model, device, trust_remote_code: as for `load_pretrained`.
        model_dtype: dtype of the weights; None for the checkpoint's.
        method, options: as for `pyglobenc.explain`.
    """
    from pyglobenc.methods.registry import find_method
    from pyglobenc.models.pretrained import load_pretrained

    # Only methods that explain a class need the model's head.
    head = find_method(method).target == "class"
    loaded = load_pretrained(model, model_dtype, device, trust_remote_code, head)
    return make_runner(*loaded, method=method, **options)


def runner_facts(runner: Runner) -> dict[str, Any]:
    """Return what two processes must have in common to compute shards of one job.

    Returns:
        The fingerprints of model and tokenizer, the settings that depend on the machine, and the most
        characters in a text.
    """
    return {
        "model": {
            "sha256": model_fingerprint(runner.model),
            "tokenizer": tokenizer_fingerprint(runner.tokenizer),
        },
        "settings": {
            "packed": runner.packed,
            "model_dtype": runner.versions["model_dtype"],
            "device": runner.model.device.type,
            "version": __version__,
        },
        "most": most_of_a_text(runner),
    }


def check_facts(runner: Runner, facts: dict[str, Any]) -> None:
    """Raise ValueError if `runner_facts` differ from those of another process."""
    found = runner_facts(runner)
    if found != facts:
        raise ValueError(
            f"the model or its settings on {platform.node()} differ from those in another process: here "
            f"{found}, there {facts}"
        )


def score_dtype(dtype: str | None, model_dtype: str) -> str:
    """Return the name of the dtype that scores are stored in."""
    return "float64" if "float64" in (dtype, model_dtype) else "float32"


def default_batch_tokens(device: str) -> int:
    """Return the most tokens in a batch on a type of device, if the user gives no number."""
    return CPU_TOKENS if device == "cpu" else GPU_TOKENS

"""`pyglobenc attribute` writes the attributions of a corpus to Parquet shards, and can be resumed."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyglobenc.cli.options import (
    add_arithmetic,
    add_lengths,
    add_model,
    add_target,
    dtype_named,
    listed,
    natural,
    portion,
    positive,
)
from pyglobenc.common.characters import printable

NAME = "attribute"
HELP = "attribute a corpus and write Parquet shards; a stopped job can be resumed"
SHARD_SIZE = 1000
ENGINES = ("local", "ray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.epilog = (
        "Run the same command again to resume a stopped job. Several processes may run it at the same time. "
        "With --engine ray, a Ray cluster computes the same shards."
    )
    _add_files(parser)
    add_model(parser, "minilm", "which is a PyPI package")
    parser.add_argument(
        "--method",
        default="globenc",
        help="attribution method (default globenc); `pyglobenc methods` lists all",
    )
    add_target(parser)
    parser.add_argument(
        "--start-layer",
        type=natural,
        default=0,
        help="lowest layer of transformer-attribution's rollout (default 0)",
    )
    add_lengths(parser, "leave it out")
    parser.add_argument(
        "--batch-tokens",
        type=positive,
        help="tokens in a batch, padding included (default 1024 on a CPU, 16384 on a GPU)",
    )
    packed = (
        "compute batches without padding; scores differ by rounding only (default: where the model "
        "supports it, except for methods that explain a class and for float32 on a GPU)"
    )
    parser.add_argument("--packed", action=argparse.BooleanOptionalAction, help=packed)
    parser.add_argument(
        "--shard-size", type=positive, default=SHARD_SIZE, help=f"records per shard (default {SHARD_SIZE})"
    )
    add_arithmetic(parser)
    _add_engine(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the planned work and the memory that it needs, and stop",
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="the corpus: .txt, .csv, .tsv, .jsonl, .parquet, a folder of Parquet files or one saved by "
        "datasets; or its address in an object store, such as s3://bucket/corpus.jsonl",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the Parquet shards; created if missing"
    )
    parser.add_argument(
        "--column", help="column or key that holds the text (default: text, sentence, or the only one)"
    )
    parser.add_argument(
        "--keep",
        type=listed,
        default=[],
        metavar="COLUMNS",
        help="columns or keys of the input, separated by commas, that the output's column input keeps: a "
        "gold label, an id",
    )
    parser.add_argument(
        "--no-header",
        action="store_true",
        help="the .csv or .tsv file has no column names; --column is a number that starts at 0",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="what runs the job: this process (local, default), or Ray: the cluster of RAY_ADDRESS or a new "
        "one on this machine; the output must then be a folder that all its nodes share",
    )
    parser.add_argument(
        "--concurrency",
        type=positive,
        help="processes of --engine ray that hold the model (default: as its GPUs or processors allow)",
    )
    parser.add_argument(
        "--num-gpus",
        type=portion,
        help="GPUs for each process of --engine ray, such as 1 or 0.5 (default: 1 if the cluster has GPUs)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the job and return the exit status."""
    from pyglobenc.cli.outputs import check_output_folder
    from pyglobenc.scale.corpus.job import Plan, default_batch_tokens, score_dtype
    from pyglobenc.scale.corpus.records import keep_columns, load_arrow, open_source

    _check_engine(options)
    # Without Arrow nothing could be written, so its absence is reported first.
    load_arrow()
    source = open_source(options.input, options.column, not options.no_header)
    source = keep_columns(source, options.keep, not options.no_header)
    check_output_folder(options.output, options.model, source.places())
    if next(source.records(), None) is None:
        raise ValueError(f"{options.input}: holds no record")
    engine = _engine(options)
    facts = engine.facts()
    options.batch_tokens = options.batch_tokens or default_batch_tokens(facts["settings"]["device"])
    source = replace(source, most=facts["most"])
    survey = engine.survey(source, options.shard_size)
    manifest = _manifest(options, source, survey, facts)
    common = {
        "method": options.method,
        "model": manifest["model"]["sha256"],
        "dtype": score_dtype(options.dtype, facts["settings"]["model_dtype"]),
        "settings": manifest["settings"],
    }
    if options.keep:
        common["keep"] = manifest["input"]["keep"]
    plan = Plan(source, Path(options.output), options.shard_size, options.batch_tokens, common, survey)
    if options.dry_run:
        return _dry_run(options, plan, engine.runner)
    return _run_job(options, plan, engine, manifest)


def _check_engine(options: argparse.Namespace) -> None:
    """Refuse options of the engine that isn't used."""
    ray = options.engine == "ray"
    for name in ("device", "dry_run") if ray else ("concurrency", "num_gpus"):
        if getattr(options, name) not in (None, False):
            one, other = ENGINES if ray else reversed(ENGINES)
            options.error(f"--{name.replace('_', '-')} belongs to --engine {one}, not to --engine {other}")


def _engine(options: argparse.Namespace) -> Any:
    from pyglobenc.scale.corpus.job import LocalEngine

    names = ("trust_remote_code", "method", "target", "start_layer", "long", "max_length", "stride")
    loading = {name: getattr(options, name) for name in ("model", *names, "backend", "packed")}
    loading |= {name: dtype_named(getattr(options, name)) for name in ("dtype", "model_dtype")}
    if options.engine == "local":
        return LocalEngine(loading | {"device": options.device})
    from pyglobenc.integrations.ray import RayEngine

    return RayEngine(loading, options.concurrency, options.num_gpus)


def _manifest(options: argparse.Namespace, source: Any, survey: Any, facts: Any) -> dict[str, Any]:
    import torch
    import transformers

    names = ("method target start_layer long max_length stride backend dtype batch_tokens shard_size").split()
    settings = {name: getattr(options, name) for name in names} | facts["settings"]
    # None, and not an empty list, is what jobs without kept columns have always stored.
    kept = [one.column for one in source.kept] or None
    read = {"sha256": survey.sha256, "texts": survey.texts, "records": survey.records}
    return {
        "input": read | {"column": source.column, "header": not options.no_header, "keep": kept},
        "model": facts["model"],
        "settings": settings,
        "info": {"input": options.input, "model": options.model}
        | {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _run_job(options: argparse.Namespace, plan: Any, engine: Any, manifest: dict[str, Any]) -> int:
    from tqdm import tqdm

    from pyglobenc.scale.corpus.manifest import check_manifest, set_complete
    from pyglobenc.scale.corpus.reading import InputChanged

    folder, shards = plan.folder, len(plan.survey.parts)
    check_manifest(folder, manifest)
    if _count_done(plan) < shards:
        set_complete(folder, False)
    try:
        total = plan.survey.records
        with tqdm(total=total, desc="attribute", unit=" sentences", disable=options.quiet) as bar:
            summary = engine.run(plan, bar.update)
    except InputChanged:
        set_complete(folder, False)
        raise
    # Every byte of every shard and side file is compared with its SHA-256 once more.
    done = _count_done(plan)
    if done < shards:
        where = "; do all nodes share this folder?" if options.engine == "ray" else ""
        raise ValueError(f"{folder}: {shards - done} of {shards} shards aren't complete after the job{where}")
    set_complete(folder, True)
    if not options.quiet:
        rate = (
            f", {summary.attributed / summary.seconds:.3g} sentences a second" if summary.attributed else ""
        )
        done = f", {summary.before} done before" if summary.before else ""
        left = f", {summary.rejected} left out (see {folder}/_rejected-*.jsonl)" if summary.rejected else ""
        print(printable(f"{summary.attributed} attributed{done}{left}{rate}"), file=sys.stderr)
    if (
        summary.rejected + summary.before_rejected
        and not summary.attributed + summary.before - summary.before_rejected
    ):
        raise ValueError(f"not one record could be attributed; {folder}/_rejected-*.jsonl gives the reasons")
    return 0


def _count_done(plan: Any) -> int:
    from pyglobenc.scale.corpus.shards import look_at_shard

    return sum(look_at_shard(plan.folder, part, plan.common).lacks is None for part in plan.survey.parts)


def _dry_run(options: argparse.Namespace, plan: Any, runner: Any) -> int:
    from pyglobenc.scale.corpus.job import batch_shapes

    records, shards, done = plan.survey.records, len(plan.survey.parts), _count_done(plan)
    shapes = list(batch_shapes(runner, plan.source, options.shard_size, options.batch_tokens))
    left_out, batches = (
        sum(count for size, _, count in shapes if not size),
        [(size, n) for size, n, _ in shapes if size],
    )
    job = (
        f"{records} records in {shards} shards, {done} of them done; {options.method} on {options.model}, "
        f"{runner.model.device}"
    )
    print(printable(job))
    print(
        f"{left_out} records would be left out; {len(batches)} batches, "
        f"{sum(size * n for size, n in batches)} tokens with padding"
    )
    if batches:
        print(f"memory: {_memory(runner, options.method, set(batches))}")
    return 0


def _memory(runner: Any, method: str, batches: set[tuple[int, int]]) -> str:
    """Return what the largest of some batches (examples, tokens) takes, or why that isn't known."""
    from pyglobenc.methods.memory import estimate_memory

    dtype = runner.options.dtype
    try:
        estimates = [
            (estimate_memory(runner.model, batch=size, n=n, method=method, dtype=dtype), size, n)
            for size, n in batches
        ]
    except ValueError as error:
        return str(error)
    worst, size, n = max(estimates, key=lambda one: one[0].peak)
    return f"{worst} at the largest batch, {size} x {n} tokens, without what Python and torch need themselves"

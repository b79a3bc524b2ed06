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
    environment_number,
    listed,
    natural,
    positive,
)
from pyglobenc.common.characters import printable

NAME = "attribute"
HELP = "attribute a corpus and write Parquet shards; a stopped job can be resumed"
SHARD_SIZE = 1000
# This many tokens stay in a CPU's caches. With 4,096, MiniLM takes a fifth longer on one core.
CPU_TOKENS, GPU_TOKENS = 1024, 16384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.epilog = (
        "Run the same command again to resume a stopped job. Under torchrun, every rank computes a part of "
        "the shards. "
        "The result doesn't depend on the number of ranks."
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
    sizes = f"{CPU_TOKENS} on a CPU, {GPU_TOKENS} on a GPU"
    parser.add_argument(
        "--batch-tokens", type=positive, help=f"tokens in a batch, padding included (default {sizes})"
    )
    packed = (
        "compute batches without padding; scores differ by rounding only (default: where the model "
        "supports it, except for methods that explain a class and for float32 on a GPU)"
    )
    parser.add_argument("--packed", action=argparse.BooleanOptionalAction, help=packed)
    parser.add_argument(
        "--shard-size", type=positive, default=SHARD_SIZE, help=f"records per shard (default {SHARD_SIZE})"
    )
    add_arithmetic(parser, device="; under torchrun the rank's")
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
        help="the corpus: .txt, .csv, .tsv, .jsonl, .parquet, or a folder saved by datasets",
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


def run(options: argparse.Namespace) -> int:
    """Run the job, or this rank's part of it, and return the exit status."""
    from pyglobenc.cli.outputs import check_output_folder
    from pyglobenc.scale.corpus.job import Plan, most_of_a_text, survey_source, try_settings
    from pyglobenc.scale.corpus.records import keep_columns, load_arrow, open_source

    # Without Arrow nothing could be written, so its absence is reported first.
    load_arrow()
    source = open_source(options.input, options.column, not options.no_header)
    source = keep_columns(source, options.keep, not options.no_header)
    check_output_folder(options.output, options.model, (options.input, *source.files))
    if next(source.records(), None) is None:
        raise ValueError(f"{options.input}: holds no record")
    rank, world = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise ValueError(f"the environment's RANK must lie in [0, {world}), its WORLD_SIZE, got {rank}")
    runner = _runner(options)
    try_settings(runner)
    options.batch_tokens = options.batch_tokens or (
        CPU_TOKENS if runner.model.device.type == "cpu" else GPU_TOKENS
    )
    source = replace(source, most=most_of_a_text(runner))
    survey = survey_source(source, options.shard_size)
    manifest = _manifest(options, source, survey, runner)
    scores = "float64" if "float64" in (options.dtype, runner.versions["model_dtype"]) else "float32"
    common = {
        "method": options.method,
        "model": manifest["model"]["sha256"],
        "dtype": scores,
        "settings": manifest["settings"],
    }
    if options.keep:
        common["keep"] = manifest["input"]["keep"]
    plan = Plan(
        source, Path(options.output), options.shard_size, options.batch_tokens, common, rank, world, survey
    )
    return _dry_run(options, plan, runner) if options.dry_run else _run_job(options, plan, runner, manifest)


def _runner(options: argparse.Namespace) -> Any:
    # These imports take seconds.
    import torch

    from pyglobenc.methods.registry import find_method
    from pyglobenc.models.pretrained import load_pretrained
    from pyglobenc.scale.corpus.job import make_runner

    device = options.device
    if device is None and torch.cuda.is_available():
        device = f"cuda:{environment_number('LOCAL_RANK', 0) % torch.cuda.device_count()}"
    # Only methods that explain a class need the model's head.
    head = find_method(options.method).target == "class"
    model, tokenizer = load_pretrained(
        options.model, dtype_named(options.model_dtype), device, options.trust_remote_code, head
    )
    names = ("method", "target", "start_layer", "long", "max_length", "stride", "backend", "packed")
    return make_runner(
        model, tokenizer, dtype=dtype_named(options.dtype), **{name: getattr(options, name) for name in names}
    )


def _manifest(options: argparse.Namespace, source: Any, survey: Any, runner: Any) -> dict[str, Any]:
    from pyglobenc._version import __version__
    from pyglobenc.scale.corpus.manifest import model_fingerprint, tokenizer_fingerprint

    names = ("method target start_layer long max_length stride backend dtype batch_tokens shard_size").split()
    settings = {name: getattr(options, name) for name in names}
    settings |= {
        "packed": runner.packed,
        "model_dtype": runner.versions["model_dtype"],
        "device": runner.model.device.type,
    }
    settings["version"] = __version__
    # None, and not an empty list, is what jobs without kept columns have always stored.
    kept = [one.column for one in source.kept] or None
    read = {"sha256": survey.sha256, "texts": survey.texts, "records": survey.records}
    return {
        "input": read | {"column": source.column, "header": not options.no_header, "keep": kept},
        "model": {
            "sha256": model_fingerprint(runner.model),
            "tokenizer": tokenizer_fingerprint(runner.tokenizer),
        },
        "settings": settings,
        "info": {"input": options.input, "model": options.model}
        | {name: runner.versions[name] for name in ("torch", "transformers")},
    }


def _run_job(options: argparse.Namespace, plan: Any, runner: Any, manifest: dict[str, Any]) -> int:
    from tqdm import tqdm

    from pyglobenc.scale.corpus.job import InputChanged, run_job
    from pyglobenc.scale.corpus.manifest import check_manifest, set_complete

    folder, rank, world = plan.folder, plan.rank, plan.world
    check_manifest(folder, manifest)
    if not _all_done(plan):
        set_complete(folder, False)
    mine = sum(part.records for part in plan.survey.parts if part.shard % world == rank)
    try:
        with tqdm(total=mine, desc="attribute", unit=" sentences", disable=options.quiet or rank > 0) as bar:
            summary = run_job(runner, plan, bar.update)
    except InputChanged:
        set_complete(folder, False)
        raise
    # The last rank to finish finds all shards done.
    if _all_done(plan):
        set_complete(folder, True)
    if not options.quiet:
        rate = (
            f", {summary.attributed / summary.seconds:.3g} sentences a second" if summary.attributed else ""
        )
        share = f" (rank {rank} of {world})" if world > 1 else ""
        done = f", {summary.before} done before" if summary.before else ""
        left = f", {summary.rejected} left out (see {folder}/_rejected-*.jsonl)" if summary.rejected else ""
        print(printable(f"{summary.attributed} attributed{done}{left}{rate}{share}"), file=sys.stderr)
    if (
        summary.rejected + summary.before_rejected
        and not summary.attributed + summary.before - summary.before_rejected
    ):
        raise ValueError(f"not one record could be attributed; {folder}/_rejected-*.jsonl gives the reasons")
    return 0


def _all_done(plan: Any) -> bool:
    return _count_done(plan) == len(plan.survey.parts)


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

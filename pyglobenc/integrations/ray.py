"""Corpora on Ray Data: a class for `map_batches`, and the engine of `pyglobenc attribute --engine ray`.

The engine's unit of work is a shard of the corpus job. Tasks of Ray Data read the records. Actors that hold
the model compute each shard and write it as the local job does: under a temporary name, then renamed. So a
shard that Ray computes again, after it lost a worker, is the same file, and no row is lost or doubled.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

from pyglobenc.integrations.datasets import Attributor
from pyglobenc.scale.corpus.job import (
    Plan,
    Summary,
    check_facts,
    compute_shard,
    is_done,
    load_runner,
    runner_facts,
    try_settings,
)
from pyglobenc.scale.corpus.reading import (
    InputChanged,
    Survey,
    count_records,
    read_batch,
    shards_by_file,
    survey_shards,
)
from pyglobenc.scale.corpus.records import Source, file_sha256, joined_sha256
from pyglobenc.scale.corpus.shards import Part

__all__ = ["Attributor", "RayEngine"]


class RayEngine:
    """Computes a job on a Ray cluster, whose nodes share the folder of the output.

    If Ray isn't initialised, the cluster of RAY_ADDRESS is joined, or one is started on this machine.

    Args:
        loading: arguments of `load_runner`, without the device.
        concurrency: number of actors. None: as many as the cluster's GPUs, or its processors, allow.
        num_gpus: GPUs of an actor. None: 1 if the cluster has any.

    Raises:
        ImportError: Ray Data isn't installed.
        ValueError: the cluster doesn't have the GPUs for one actor.
    """

    def __init__(
        self, loading: dict[str, Any], concurrency: int | None = None, num_gpus: float | None = None
    ):
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ImportError(
                f"the engine needs Ray Data, which is not installed: pip install 'ray[data]' ({error})"
            ) from error
        _start(ray)
        self.ray, resources = ray, ray.cluster_resources()
        gpus = resources.get("GPU", 0)
        self.num_gpus = min(gpus, 1) if num_gpus is None else num_gpus
        if self.num_gpus > gpus:
            raise ValueError(f"an actor needs {self.num_gpus:g} GPUs, and the Ray cluster has {gpus:g}")
        room = gpus / self.num_gpus if self.num_gpus else resources.get("CPU", 1)
        self.concurrency = concurrency or max(1, int(room))
        if os.path.isdir(loading["model"]):
            loading = loading | {"model": os.path.abspath(loading["model"])}
        self.loading = loading | {"device": "cuda" if self.num_gpus else "cpu"}

    def facts(self) -> dict[str, Any]:
        """Try the settings on a worker, and return what `runner_facts` returns there."""
        (self._facts,) = self._results([(_facts, self.loading)], num_gpus=self.num_gpus)
        return self._facts

    def survey(self, source: Source, shard_size: int) -> Survey:
        """Return the survey of a corpus, whose files are read at the same time."""
        sha256, counts = self._sha256(source), self._counts(source)
        same = self.ray.put(source), shard_size, self.ray.put(counts)
        found = self._results(
            [(survey_shards, *same, shards) for shards in shards_by_file(counts, shard_size) if shards]
        )
        return Survey(sha256, tuple(chain.from_iterable(found)))

    def run(self, plan: Plan, progress: Callable[[int], None]) -> Summary:
        """Compute the shards that aren't complete yet; arguments and result as for `run_job`."""
        summary, start = Summary(), time.perf_counter()
        plan = replace(plan, folder=plan.folder.absolute())
        missing = [part for part in plan.survey.parts if not is_done(plan, part, summary, progress)]
        for row in self._compute(plan, missing) if missing else ():
            # A shard whose actor was lost after it had been written is found done, and belongs to this run.
            summary.attributed += row["attributed"] + row["before"] - row["before_rejected"]
            summary.rejected += row["rejected"] + row["before_rejected"]
            progress(row["records"])
        if self._sha256(plan.source) != plan.survey.sha256:
            raise InputChanged.of(plan.source)
        summary.seconds = time.perf_counter() - start
        return summary

    def _compute(self, plan: Plan, missing: Sequence[Part]) -> Iterator[dict[str, int]]:
        """Compute some shards and yield their counts, in any order."""
        data, counts = self.ray.data, self._counts(plan.source)
        wanted = {part.shard: part for part in missing}
        tasks = [
            {"parts": pickle.dumps([wanted[shard] for shard in shards if shard in wanted])}
            for shards in shards_by_file(counts, plan.shard_size)
            if not wanted.keys().isdisjoint(shards)
        ]
        # The input may have lost all its records, which `run` notices.
        if not tasks:
            return
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        # Each shard becomes a block of its own, so that each goes to the next actor that is free.
        context.target_max_block_size = 1
        with data.DataContext.current(context), _cause():
            shards = data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
                read_batch,
                fn_args=(plan.source, plan.shard_size, counts),
                batch_size=1,
                # Reading hardly computes. It must not wait for processors that the actors hold.
                num_cpus=0,
                concurrency=self.concurrency,
            )
            done = shards.map_batches(
                _ShardWriter,
                # The survey of a large corpus is large, and the actors don't use it.
                fn_constructor_args=(self.loading, self._facts, replace(plan, survey=None)),
                batch_size=1,
                num_cpus=1,
                num_gpus=self.num_gpus,
                compute=data.ActorPoolStrategy(size=self.concurrency),
            )
            yield from done.iter_rows()

    def _counts(self, source: Source) -> list[int]:
        """Return the number of records of each file."""
        same = self.ray.put(source)
        return self._results([(count_records, same, path) for path in source.files])

    def _sha256(self, source: Source) -> str:
        """Return the SHA-256 of the source, as `Source.sha256` does."""
        return joined_sha256(self._results([(file_sha256, path) for path in source.now()]))

    def _results(self, calls: Sequence[tuple[Any, ...]], **resources: Any) -> list[Any]:
        """Return the results of some calls, each a function and its arguments, made on the cluster."""
        with _cause():
            return self.ray.get(
                [
                    self.ray.remote(num_cpus=1, **resources)(call).remote(*arguments)
                    for call, *arguments in calls
                ]
            )


class _ShardWriter:
    """Callable class for `map_batches`: computes and writes one shard of a job.

    Args:
        loading: arguments of `load_runner`.
        facts: what `runner_facts` returned on the worker that tried the settings.
        plan: plan of the job.

    Raises:
        ValueError: this worker's model or settings are others.
    """

    def __init__(self, loading: dict[str, Any], facts: dict[str, Any], plan: Plan):
        self.runner, self.plan = load_runner(**loading), plan
        check_facts(self.runner, facts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        part, records = pickle.loads(batch["shard"][0])
        summary = Summary()
        compute_shard(self.runner, self.plan, part, records, True, summary)
        counts = asdict(summary) | {"records": part.records}
        return {name: [count] for name, count in counts.items() if name != "seconds"}


def _facts(loading: dict[str, Any]) -> dict[str, Any]:
    runner = load_runner(**loading)
    try_settings(runner)
    return runner_facts(runner)


def _start(ray: Any) -> None:
    """Join a Ray cluster or start one, unless that is done."""
    # Errors come back as exceptions. Ray would print each of them, with its trace, as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.CRITICAL, include_dashboard=False)
    # Ray replaces the handler, which ends the command as Ctrl-C does.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _cause() -> Iterator[None]:
    """Context in which an error of a worker is raised as the error that it was there."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        cause: BaseException | None = error
        while isinstance(cause, RayError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        # An actor that failed to start keeps the error's text alone, whose last line is the message.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = lines[-1] if getattr(error, "actor_init_failed", False) else " ".join(lines)
        raise (cause or RuntimeError(f"Ray: {message}")) from error

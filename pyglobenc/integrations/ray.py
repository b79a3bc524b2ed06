"""Corpora on Ray Data: a class for `map_batches`, and the engine of `pyglobenc attribute --engine ray`.

The engine's unit of work is a shard of the corpus job. Tasks of Ray Data read the records. Actors that hold
the model compute each shard and write it as the local job does: under a temporary name, then renamed. So a
shard that Ray computes again, after it lost a worker, is the same file, and no row is lost or doubled.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
    from_row,
    read_batch,
    shards_by_file,
    survey_shards,
    to_row,
)
from pyglobenc.scale.corpus.records import Source, file_sha256, joined_sha256
from pyglobenc.scale.corpus.shards import Part

__all__ = ["Attributor", "RayEngine"]

# How often Ray computes a shard again after it lost the worker. A shard that ends every worker, as where its
# texts take more memory than there is, would otherwise be tried for ever.
RETRIES = 5


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
        with warnings.catch_warnings():
            # Ray warns of settings that Ray itself copies.
            warnings.filterwarnings("ignore", message=r"`\w+` is deprecated")
            for part, done in self._compute(plan, missing) if missing else ():
                # A shard that was written by an actor that was then lost belongs to this run.
                summary.attributed += done.attributed + done.before - done.before_rejected
                summary.rejected += done.rejected + done.before_rejected
                progress(part.records)
        if self._sha256(plan.source) != plan.survey.sha256:
            raise InputChanged.of(plan.source)
        summary.seconds = time.perf_counter() - start
        return summary

    def _compute(self, plan: Plan, missing: Sequence[Part]) -> Iterator[tuple[Part, Summary]]:
        """Compute some shards and yield each one's part and counts, in any order."""
        data, counts = self.ray.data, self._counts(plan.source)
        wanted = {part.shard: part for part in missing}
        tasks = [
            to_row([wanted[shard] for shard in shards if shard in wanted])
            for shards in shards_by_file(counts, plan.shard_size)
            if not wanted.keys().isdisjoint(shards)
        ]
        # The input may have lost all its records, which `run` notices.
        if not tasks:
            return
        with _one_row_a_block(data):
            shards = data.from_arrow(tasks).map_batches(
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
                max_task_retries=RETRIES,
                compute=data.ActorPoolStrategy(size=self.concurrency),
            )
            with _lost(self.ray):
                for batch in done.iter_batches(batch_size=1):
                    found = from_row(batch)
                    if isinstance(found, Exception):
                        raise found
                    yield found

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

    It returns exceptions as rows, because Ray Data would raise them without their type.

    Args:
        loading: arguments of `load_runner`.
        facts: what `runner_facts` returned on the worker that tried the settings.
        plan: plan of the job.
    """

    def __init__(self, loading: dict[str, Any], facts: dict[str, Any], plan: Plan):
        self.plan, self.error = plan, None
        try:
            self.runner = load_runner(**loading)
            check_facts(self.runner, facts)
        except Exception as error:
            self.error = error

    def __call__(self, batch: dict[str, Any]) -> Any:
        shard, summary = from_row(batch), Summary()
        if isinstance(shard, Exception) or self.error:
            return to_row(self.error or shard)
        part, records = shard
        try:
            compute_shard(self.runner, self.plan, part, records, True, summary)
        except Exception as error:
            return to_row(error)
        return to_row((part, summary))


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
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise (error.cause or error) from error


@contextmanager
def _lost(ray: Any) -> Iterator[None]:
    """Context in which a shard whose workers were all lost ends the job, with an error that says so."""
    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(
            f"Ray lost the worker of one shard {RETRIES + 1} times; its memory may be too small: try fewer "
            "--batch-tokens, or a lower --concurrency"
        ) from error


@contextmanager
def _one_row_a_block(data: Any) -> Iterator[None]:
    """Context in which each row is a block of its own, so that its shard goes to the next actor that is free.

    Ray's progress bars are off.
    """
    context = data.DataContext.get_current()
    names = {"target_max_block_size": 1, "enable_progress_bars": False}
    before = {name: getattr(context, name) for name in names}
    try:
        for name, value in names.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)

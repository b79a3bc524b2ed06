"""Chooses the size of a batch by an estimate of its memory, and halves it when memory runs out."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from pyglobenc.hf.unwrap import stock_model
from pyglobenc.inputs.windows import Encoded
from pyglobenc.methods.memory import ESTIMATED, estimate_memory

log = logging.getLogger("pyglobenc")

# A batch may use this share of the free memory, because allocators round up and other processes need some.
SHARE = 0.8

# The first two are messages of torch's CPU allocators. The third comes from CUDA and Triton, if a library, a
# kernel's code or a graph needs memory. The last one comes from cuBLAS and cuDNN.
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")

# The activations of so many tokens stay in a CPU's caches. With 4,096, MiniLM's forward pass takes nearly
# twice the CPU time for each token, and transformer attribution in float64 more than twice.
CACHED_TOKENS = 512

Job = TypeVar("Job")
Result = TypeVar("Result")


def cached_tokens(model: nn.Module, most: int) -> int:
    """Return how many tokens a batch should hold: `most`, or fewer on a CPU, where that is faster."""
    return min(most, CACHED_TOKENS) if stock_model(model).device.type == "cpu" else most


def fitting_batch(
    model: nn.Module,
    n: int,
    most: int,
    method: str = "globenc",
    dtype: torch.dtype | None = None,
    available: int | None = None,
) -> int:
    """Return how many examples fit into memory at once, by `estimate_memory`.

    Args:
        model: as for `GlobEnc`; its weights are in memory already.
        n: number of tokens of the longest example, special tokens included.
        most: the largest answer.
        method: name of the method. One that isn't in ESTIMATED counts as gradient x input, which keeps the
            graph of all layers.
        dtype: dtype of the attribution, as for `GlobEnc`.
        available: bytes that may be used; None for what is free on the model's device.

    Returns:
        A number from 1 to `most`. It is `most` if the free memory isn't known, and 1 if no estimate is known
        for the model.
    """
    if most <= 1:
        # The estimate walks through all modules, which costs time for a short text.
        return most
    model = stock_model(model)
    available = available_bytes(model.device) if available is None else available
    if available is None:
        return most
    method = method if method in ESTIMATED else "gradient-x-input"
    try:
        one = estimate_memory(model, batch=1, n=n, method=method, dtype=dtype)
    except ValueError as error:
        log.info("batches of 1: %s", error)
        return 1
    fit = int((available * SHARE - one.kernels) // (one.saved + one.workspace + one.maps))
    if fit < most:
        log.info(
            "batches of %d: %d tokens take %d MiB an example, %d MiB are free",
            max(1, fit),
            n,
            one.peak >> 20,
            available >> 20,
        )
    return max(1, min(most, fit))


def portions(items: Iterable[Job], size: Callable[[Job], int], most: int) -> Iterator[list[Job]]:
    """Yield items in order, in portions whose sizes add up to at most `most`.

    Args:
        items: the items.
        size: returns the size of an item.
        most: largest sum. One item may have more.
    """
    portion: list[Job] = []
    total = 0
    for item in items:
        more = size(item)
        if portion and total + more > most:
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += more
    if portion:
        yield portion


def buckets(texts: list[tuple[int, Encoded]], batch_tokens: int) -> Iterator[list[tuple[int, Encoded]]]:
    """Group texts of like length.

    Args:
        texts: the number of each text, and its tokens.
        batch_tokens: the most tokens, with padding, in a group. One text may have more.

    Yields:
        Groups of texts, shortest first.
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


def in_batches(
    run: Callable[[Sequence[Job]], Sequence[Result]], jobs: Sequence[Job], size: int
) -> Iterator[tuple[Job, Result]]:
    """Run jobs in batches, and halve the batch size whenever memory runs out.

    Args:
        run: takes the jobs of a batch and returns their results in the same order.
        jobs: all jobs.
        size: size of the first batch.

    Yields:
        Each job with its result, in order.

    Raises:
        RuntimeError: memory ran out for a single job. Other errors of `run` are passed on.
    """
    start = 0
    while start < len(jobs):
        batch = jobs[start : start + size]
        results = _run(run, batch)
        if results is None:
            size = (len(batch) + 1) // 2
            log.warning("out of memory with %d examples at once; going on with %d", len(batch), size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield from zip(batch, results, strict=True)
        start += len(batch)


def _run(run: Callable[[Sequence[Job]], Sequence[Result]], batch: Sequence[Job]) -> Sequence[Result] | None:
    """Return the results, or None if memory ran out for more than one job.

    The error keeps tensors alive, so it must be gone when this function returns.
    """
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not out_of_memory(error):
            raise
    return None


def out_of_memory(error: BaseException) -> bool:
    """Return whether torch or Python raised this error because memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free for tensors on a device; None if that isn't known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    return min((free for free in (_machine_free(), _container_free()) if free is not None), default=None)


def _machine_free() -> int | None:
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    fields = dict(line.split(":") for line in info.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _container_free() -> int | None:
    """Return the bytes that a container's limit leaves free; None without a limit."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    return max(0, int(limit.read_text()) - int(used.read_text()))

"""How many examples at once: as many as an estimate says fit, and half of that each time memory runs out all
the same.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.memory import ESTIMATED, estimate_memory

log = logging.getLogger("pyglobenc")

# of what is free: allocators round up, and other processes may want some
SHARE = 0.8

# of torch's CPU allocator on two systems; of CUDA and Triton where a library, a kernel's code or a graph
# takes memory; of cuBLAS, cuDNN
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")

Job = TypeVar("Job")
Result = TypeVar("Result")


def fitting_batch(
    model: nn.Module,
    n: int,
    most: int,
    method: str = "globenc",
    dtype: torch.dtype | None = None,
    available: int | None = None,
) -> int:
    """Examples that fit into memory at once, by `estimate_memory`.

    Args:
        model: as for `GlobEnc`; its weights are there already.
        n: tokens of the longest example, special tokens included.
        most: the largest answer.
        method: a name in ESTIMATED; for any other the answer is most.
        dtype: of the attribution arithmetic, as for `GlobEnc`.
        available: bytes; None for what is free on the model's device.

    Returns:
        From 1 to most; most where it isn't known what is free.
    """
    if most <= 1:
        # an estimate walks through all modules, which takes a part of a short text's forward pass
        return most
    model = stock_model(model)
    available = available_bytes(model.device) if available is None else available
    if available is None or method not in ESTIMATED:
        return most
    one = estimate_memory(model, batch=1, n=n, method=method, dtype=dtype)
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


def in_batches(
    run: Callable[[Sequence[Job]], Sequence[Result]], jobs: Sequence[Job], size: int
) -> Iterator[tuple[Job, Result]]:
    """Run jobs in batches, halving the size from the batch on that memory runs out for.

    Args:
        run: of a batch's jobs, their results in order.
        jobs: all of them.
        size: of the first batch.

    Yields:
        Each job with its result, in order.

    Raises:
        RuntimeError: out of memory with one job alone, and whatever run raises.
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
    """Results, or None when memory ran out for more than one job: the error, which keeps tensors alive, is
    gone on return.
    """
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not out_of_memory(error):
            raise
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether torch, on a GPU or a CPU, or Python raised it for lack of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free for tensors on a device; None where it isn't known."""
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
    """What a container's limit leaves; None without a limit."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not (limit.exists() and used.exists()) or limit.read_text().strip() == "max":
        return None
    return max(0, int(limit.read_text()) - int(used.read_text()))

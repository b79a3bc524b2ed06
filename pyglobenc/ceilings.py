"""Measured ceilings of a device, and a clock for calls on it."""

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch

from pyglobenc.costs import Ceilings, synchronize

GEMM, GEMM_GPU = 1024, 8192
# exponentials of arrays that stay in a cache; copies of arrays that don't
EXPS, COPY = 1 << 18, 1 << 25
ROUNDS = (3, 200)


def times(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of single calls, one warm-up aside, for about as long as asked for; several launches a sample where they are short."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    # under 100 us the clock and the launch are part of what is measured
    repeats = max(1, round(1e-4 / max(time.perf_counter() - start, 1e-9)))
    out: list[float] = []
    begin = time.perf_counter()
    while len(out) < ROUNDS[0] or (time.perf_counter() - begin < seconds and len(out) < ROUNDS[1]):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        out.append((time.perf_counter() - start) / repeats)
    return out


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, _, high = quantiles(samples, n=4)
    return low, median(samples), high


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """The best of torch's matrix product, exponential and copy: a ceiling is what was reached, not what is typical.

    On a CPU one thread is tried too: where other programs keep the cores busy, several wait for each other longer than they work.

    Args:
        device, dtype: of the products; exponentials and copies are float32.
        seconds: spent on each of the three.
    """
    found, threads = _measure(device, dtype, seconds), torch.get_num_threads()
    if device.type == "cuda" or threads == 1:
        return found
    torch.set_num_threads(1)
    try:
        return found.best(_measure(device, dtype, seconds / 2))
    finally:
        torch.set_num_threads(threads)


def _measure(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    size = GEMM_GPU if device.type == "cuda" else GEMM
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    gemm = min(times(lambda: torch.mm(a, b, out=product), device, seconds))
    x = torch.rand(EXPS, device=device)
    y = torch.empty_like(x)
    exp = min(times(lambda: torch.exp(x, out=y), device, seconds))
    source = torch.ones(COPY, device=device)
    target = torch.empty_like(source)
    copy = min(times(lambda: target.copy_(source), device, seconds))
    return Ceilings(2 * size**3 / gemm, EXPS / exp, 2 * source.numel() * source.element_size() / copy)

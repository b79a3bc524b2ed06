"""Measures what a device reaches at best, and times calls on it, for `pyglobenc bench` and the benchmarks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from statistics import median, quantiles

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import load
from pyglobenc.bench.costs import Ceilings, synchronize

# At these numbers of rows, inner length and columns, torch's matrix product is fastest.
GEMM, GEMM_GPU = (768, 3072, 768), (8192, 8192, 8192)
# The array for exponentials fits in a cache; the array for copies doesn't.
EXPS, COPY = 1 << 19, 1 << 25
# Seconds of the warm-up, and of the shortest sample in which the time of reading the clock is negligible.
WARM_UP, SHORT = 0.05, 1e-4
ROUNDS = (3, 200)
# A block of this many bytes is close to the largest one whose release makes glibc keep freed memory.
KEPT = (32 << 20) - (1 << 16)


def prepare(
    call: Callable[[], object], device: torch.device, seconds: float
) -> tuple[Callable[[], None], int, int]:
    """Warm up a call that has run before, and plan its measurement.

    Args:
        call: function without arguments; its result is dropped.
        device: the device that it runs on.
        seconds: time that the measurement should take.

    Returns:
        A function that takes one sample and waits for the device, the number of calls in a sample, and the
        number of samples to take. A sample has several calls if they are short.
    """
    # Until such a block has been released, glibc returns the pages of short-lived tensors to the system at
    # unpredictable moments, and getting them back takes up to 40 % of a call. A process that has run a long
    # input keeps its pages.
    torch.empty(KEPT, dtype=torch.uint8, device="cpu")
    taken: list[float] = []
    spent = 0.0
    while spent < WARM_UP or (spent < seconds and len(taken) < ROUNDS[0]):
        start = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - start)
        spent += taken[-1]
    once = min(taken)
    repeats = max(1, round(SHORT / once))

    def sample() -> None:
        for _ in range(repeats):
            call()
        synchronize(device)

    return sample, repeats, min(max(ROUNDS[0], round(seconds / (once * repeats))), ROUNDS[1])


def times(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Return the seconds that single calls took, measured for about the time asked for; see `prepare`."""
    sample, repeats, rounds = prepare(call, device, seconds)
    out = []
    for _ in range(rounds):
        start = time.perf_counter()
        sample()
        out.append((time.perf_counter() - start) / repeats)
    return out


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile of at least two numbers."""
    low, _, high = quantiles(samples, n=4)
    return low, median(samples), high


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """Measure the best rates of matrix products, exponentials and copies that the device reaches.

    Exponentials are torch's or the project's own, whichever is faster. On a CPU one thread is tried too,
    because on a busy machine several threads wait for each other longer than they work.

    Args:
        device: device to measure.
        dtype: dtype of the products; exponentials and copies are float32.
        seconds: time for each measurement.
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
    rows, inner, columns = shape = GEMM_GPU if device.type == "cuda" else GEMM
    a, b = (
        torch.randn(rows, inner, device=device).to(dtype),
        torch.randn(inner, columns, device=device).to(dtype),
    )
    product = a.new_empty(rows, columns)

    def multiply() -> None:
        torch.mm(a, b, out=product)

    gemm = min(times(multiply, device, seconds))
    if device.type == "cuda" and dtype == torch.float32:
        # The kernels do the same: three tf32 products give the precision of float32.
        with _tf32():
            gemm = min(gemm, 3 * min(times(multiply, device, seconds)))
    source = torch.ones(COPY, device=device)
    target = torch.empty_like(source)
    copy = min(times(lambda: target.copy_(source), device, seconds))
    return Ceilings(
        2 * prod(shape) / gemm, _exp_rate(device, seconds), 2 * source.numel() * source.element_size() / copy
    )


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _exp_rate(device: torch.device, seconds: float) -> float:
    """Return exponentials per second."""
    module = load("exp", "triton")[0] if device.type == "cuda" else None
    if module is not None:
        # torch's exponential is limited by memory, to a tenth of what the hardware unit does.
        return module.exp(device) / min(times(lambda: module.exp(device), device, seconds))
    x = torch.rand(EXPS, device=device)
    y = torch.empty_like(x)
    return EXPS / min(min(times(lambda own=own: own(x, y), device, seconds)) for own in _exponentials(device))


def _exponentials(device: torch.device) -> list[Callable[[Tensor, Tensor], object]]:
    """Return the functions that write e^x of one array to another: torch's, and the CPU kernels' if built."""
    out: list[Callable[[Tensor, Tensor], object]] = [lambda x, y: torch.exp(x, out=y)]
    if device.type == "cpu":
        try:
            from pyglobenc.backends.cpu._extension import kernels
        except ImportError:
            return out
        out.append(lambda x, y: kernels.exp(x, y, torch.get_num_threads()))
    return out

"""Measured ceilings of a device, and a clock for calls on it, the same for `pyglobenc bench` and for benchmarks/."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from statistics import median, quantiles

import torch
from torch import Tensor

from pyglobenc.backends.dispatch import load
from pyglobenc.bench.costs import Ceilings, synchronize

# rows, inner length and columns of the product that torch is fastest at
GEMM, GEMM_GPU = (768, 3072, 768), (8192, 8192, 8192)
# exponentials of arrays that stay in a cache; copies of arrays that don't
EXPS, COPY = 1 << 19, 1 << 25
# seconds: of warm-up, and below which the clock and the launch are part of what is measured
WARM_UP, SHORT = 0.05, 1e-4
ROUNDS = (3, 200)
# bytes: nearly the largest block whose release makes glibc keep memory
KEPT = (32 << 20) - (1 << 16)


def prepare(call: Callable[[], object], device: torch.device, seconds: float) -> tuple[Callable[[], None], int, int]:
    """Warm up a call that ran before and lay out its measurement.

    Args:
        call: without arguments; what it returns is dropped.
        device: that it runs on.
        seconds: that the measurement should take.

    Returns:
        what makes a sample: several calls where they are short, up to the end of what the device was given; how many calls that are; how
        many samples to take.
    """
    # until such a block was released, glibc gives short-lived tensors' pages back to the system at moments that depend on all that the
    # process did before, and every call takes them anew, at up to 40 % of its time; a process that ran a long input keeps them
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
    """Seconds of single calls, for about as long as asked for; see `prepare`."""
    sample, repeats, rounds = prepare(call, device, seconds)
    out = []
    for _ in range(rounds):
        start = time.perf_counter()
        sample()
        out.append((time.perf_counter() - start) / repeats)
    return out


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, _, high = quantiles(samples, n=4)
    return low, median(samples), high


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings:
    """The best of torch's matrix product, of its exponential or the project's own, and of its copy: what was reached, not what is typical.

    On a CPU one thread is tried too: where other programs keep the cores busy, several wait for each other longer than they work.

    Args:
        device, dtype: of the products; exponentials and copies are float32.
        seconds: spent on each of the four.
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
    a, b = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, columns, device=device).to(dtype)
    product = a.new_empty(rows, columns)

    def multiply() -> None:
        torch.mm(a, b, out=product)

    gemm = min(times(multiply, device, seconds))
    if device.type == "cuda" and dtype == torch.float32:
        # as the kernels do: three tf32 products keep float32's digits
        with _tf32():
            gemm = min(gemm, 3 * min(times(multiply, device, seconds)))
    source = torch.ones(COPY, device=device)
    target = torch.empty_like(source)
    copy = min(times(lambda: target.copy_(source), device, seconds))
    return Ceilings(2 * prod(shape) / gemm, _exp_rate(device, seconds), 2 * source.numel() * source.element_size() / copy)


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _exp_rate(device: torch.device, seconds: float) -> float:
    """Exponentials a second."""
    module = load("exp", "triton")[0] if device.type == "cuda" else None
    if module is not None:
        # torch's is bound by the memory that its arrays pass, a tenth of what the unit does
        return module.exp(device) / min(times(lambda: module.exp(device), device, seconds))
    x = torch.rand(EXPS, device=device)
    y = torch.empty_like(x)
    return EXPS / min(min(times(lambda own=own: own(x, y), device, seconds)) for own in _exponentials(device))


def _exponentials(device: torch.device) -> list[Callable[[Tensor, Tensor], object]]:
    """What writes e^x of one array to another: torch, and the CPU kernels where they are built."""
    out: list[Callable[[Tensor, Tensor], object]] = [lambda x, y: torch.exp(x, out=y)]
    if device.type == "cpu":
        try:
            from pyglobenc.backends.cpu._extension import kernels
        except ImportError:
            return out
        out.append(lambda x, y: kernels.exp(x, y, torch.get_num_threads()))
    return out

"""One benchmark for every op: its backends and what a user has without them, over n, dtype and batch, on one
layer of BERT-base's shape.

Baselines: "compile", torch.compile of the reference; "materialised", the algorithm that stores what the op
doesn't form, where that takes at most STORED bytes; "sdpa", torch's fused attention on the same queries and
keys, without any attribution. Right before fast: each is compared with the float64 reference before it is
timed.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from allocations import measure_allocations
from measure import DEVICE

from pyglobenc.backends.dispatch import INTERPRETED
from pyglobenc.bench.ceilings import measure_ceilings, prepare
from pyglobenc.bench.costs import Ceilings, count, flatten
from pyglobenc.bench.example_inputs import DH, H, tensors
from pyglobenc.bench.op_table import OP_TABLE

LENGTHS, BATCHES, DTYPES = (128, 512, 2048), (1, 8), ("float32", "bfloat16", "float16")
# of ops alone, beside those; the methods would store too much
LONGER = (4096,) if DEVICE.type == "cuda" else ()
# ops that may be given a half-precision model's tensors; the rules of relevance need float32's digits
HALF = ("pair_norms", "rollout_step", "head_gram", "head_norms", "mapped_square", "proximity")
D = H * DH
COMPILED, MATERIALISED, SDPA = "compile", "materialised", "sdpa"
# (n, batch): the compiler takes up to a minute a shape
COMPILED_SHAPE = (512, 1)
STORED = 4 << 30
# where torch's products run at 1 to 2 GFLOP/s
SLOW = ("cpu", torch.float16)
# pairs that the float64 reference is asked for
CHECKED = 512 * 512
# spent on each measurement, as by `pyglobenc bench`
SECONDS = 0.4


def suite(
    op: str,
    materialised: Callable[..., Any] | None = None,
    stored: Callable[[int, int], int] = lambda batch, n: 0,
    sdpa: bool = False,
) -> Callable[..., None]:
    """The benchmark of an op, parametrised.

    Args:
        op: its name.
        materialised: takes the op's positional arguments and returns what the op returns; None: there is no
            such algorithm.
        stored: of B and n, the numbers that it holds at one time.
        sdpa: torch's fused attention is a natural unit.
    """
    builders = {name: named(name) for name in import_module(f"pyglobenc.ops.{op}").BACKENDS} | {
        COMPILED: compiled
    }
    if materialised is not None:
        builders[MATERIALISED] = lambda op, args: lambda: materialised(*args)
    if sdpa:
        builders[SDPA] = attention
    dtypes = DTYPES if op in HALF else DTYPES[:1]
    cases = product(LENGTHS + LONGER, dtypes, BATCHES, builders)
    cases = [case for case in cases if case[3] != COMPILED or (case[0], case[2]) == COMPILED_SHAPE]

    @pytest.mark.parametrize("n, dtype, batch, backend", cases)
    def bench(benchmark, n, dtype, batch, backend):
        device, dtype = DEVICE, getattr(torch, dtype)
        kernel = backend not in (COMPILED, MATERIALISED, SDPA, "reference")
        if backend == "triton" and INTERPRETED:
            pytest.skip("interpreted kernels show what they compute, not how fast")
        if (device.type, dtype) == SLOW and not kernel:
            pytest.skip("torch's float16 products run at 1 to 2 GFLOP/s on a CPU")
        size = stored(batch, n) * dtype.itemsize
        if backend == MATERIALISED and size > STORED:
            pytest.skip(f"stores {size / 2**30:.1f} GiB, more than {STORED >> 30}")
        # first, as in the command: the inputs' place in memory depends on the allocator, which this settles
        reached = ceilings(device, dtype)
        try:
            made = tensors(device.type, n, batch, dtype)
            args = [made[name] for name in "qkv"] if backend == SDPA else OP_TABLE[op].arguments(made)
            call = builders[backend](op, args)
            result = call()
            if backend != SDPA:
                check(op, builders[backend], result, device.type, n, batch, dtype)
        except (ValueError, TypeError, NotImplementedError) as error:
            if not kernel:
                raise
            pytest.skip(str(error))
        cost = count("attention" if backend == SDPA else op, args, result, batch=batch, heads=H, n=n, dh=DH)
        time_it(benchmark, call, device, cost, reached)

    return bench


def named(backend):
    def build(op, args):
        function = getattr(import_module(f"pyglobenc.ops.{op}"), op)
        return lambda: function(*args, backend=backend)

    return build


def attention(op, args):
    return lambda: torch.nn.functional.scaled_dot_product_attention(*args)


def compiled(op, args):
    """The op with torch.compile of the reference for a backend."""
    module, function = (
        import_module(f"pyglobenc.ops.{op}"),
        import_module(f"pyglobenc.backends.reference.{op}").run,
    )
    torch._dynamo.reset()
    faster = torch.compile(function)

    def call():
        run, module.run = module.run, lambda op, backend, available, *given: faster(*given)
        try:
            return getattr(module, op)(*args)
        finally:
            module.run = run

    return call


def check(op: str, build: Callable, result: Any, device: str, n: int, batch: int, dtype: torch.dtype) -> None:
    """Every array of the result against the float64 reference, relative to its largest entry: half of the
    dtype's digits, since the same quantity is compared, not its last bits; or, where the op divides by what
    cancels, as near as the reference comes in float32. Of shapes too large for that the result of the
    shortest.
    """
    if batch * n * n > CHECKED:
        n = LENGTHS[0]
        result = build(op, OP_TABLE[op].arguments(tensors(device, n, batch, dtype)))()
    for ours, (plain, exact) in zip(flatten(result), exact_results(op, device, n, batch, dtype), strict=True):
        error, allowed = (
            float((t.reshape(exact.shape).double() - exact).abs().amax() / exact.abs().amax())
            for t in (ours, plain)
        )
        limit = max(torch.finfo(dtype).eps ** 0.5, 4 * allowed)
        assert error < limit, f"{op}: off by {error:.1e} of the largest entry, plain float32 by {allowed:.1e}"


@lru_cache(maxsize=2)
def exact_results(
    op: str, device: str, n: int, batch: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The reference in float32 and in float64 on the same, already rounded inputs."""

    def widen(part, wide):
        return part.to(wide) if isinstance(part, torch.Tensor) else [widen(one, wide) for one in part]

    args, function = (
        OP_TABLE[op].arguments(tensors(device, n, batch, dtype)),
        getattr(import_module(f"pyglobenc.ops.{op}"), op),
    )
    results = [
        flatten(function(*widen(args, wide), backend="reference")) for wide in (torch.float32, torch.float64)
    ]
    return list(zip(*results, strict=True))


@cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What the device reaches with products of a dtype, or of float32 where those are faster."""
    if dtype == torch.float32:
        return measure_ceilings(device, dtype, SECONDS)
    single = ceilings(device, torch.float32)
    return single if (device.type, dtype) == SLOW else single.best(measure_ceilings(device, dtype, SECONDS))


def peak_mb(call, device):
    """MiB above what was there before, at the call's worst moment."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return measure_allocations(call).peak / 2**20


def time_it(benchmark, call, device, cost, reached):
    """Time a call and set it beside what the device reaches."""
    benchmark.extra_info["peak_mb"] = f"{peak_mb(call, device):.3f}"
    sample, repeats, rounds = prepare(call, device, SECONDS)
    benchmark.pedantic(sample, rounds=rounds, iterations=1)
    seconds = benchmark.stats.stats.median / repeats
    counted = {"flops": cost.flops, "exps": cost.exps, "bytes": cost.bytes}
    speeds = {"gflops": cost.flops / seconds / 1e9, "gb_s": cost.bytes / seconds / 1e9}
    speeds["share"] = cost.floor(reached, overlap=device.type == "cuda") / seconds
    limits = {"gemm_flops": reached.flops, "exp_rate": reached.exps, "copy_bytes": reached.bytes}
    benchmark.extra_info["calls_a_round"] = repeats
    benchmark.extra_info.update({name: f"{value:.6g}" for name, value in (counted | speeds | limits).items()})

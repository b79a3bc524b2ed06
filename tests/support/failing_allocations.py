"""Lets the allocations of a call fail, one after the other, in a process with failing_allocator.cpp.

    LD_PRELOAD=failing_allocator.so python failing_allocations.py ops THREADS [SET ...]
    LD_PRELOAD=failing_allocator.so python failing_allocations.py models

Every allocation of each op fails, and some of each model's: first those of the compiled module, then those of
torch's allocator. The call must raise MemoryError or RuntimeError. The same call without a failure must then
give the same result as before. The last line printed is the number of failures as JSON, by call and library.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from fuzz import ops_of, small_tensors
from pytest import MonkeyPatch

from pyglobenc.backends.cpu._extension import kernels
from pyglobenc.bench.costs import flatten
from pyglobenc.bench.op_table import OP_TABLE

MODULE, TORCH = "_cpu.", "libc10."


def code_of(name: str) -> tuple[int, int]:
    """Return the addresses between which the code of a loaded library lies."""
    ends = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_, path = line.split()
        if "x" in permissions and Path(path).name.startswith(name):
            ends += [int(end, 16) for end in span.split("-")]
    return min(ends), max(ends)


def failures(allocator: ctypes.CDLL, library: str, call: Callable[[], list[torch.Tensor]], step: int) -> int:
    """Let every `step`-th allocation of a call fail, in a call of its own, and return how many failed."""
    span, count = code_of(library), 0
    wanted = [t.clone() for t in call()]
    while True:
        kernels.free_kept()
        allocator.arm(*span, 1 + count * step)
        try:
            call()
            error = None
        except (MemoryError, RuntimeError) as raised:
            error = raised
        failed = allocator.has_failed()
        allocator.arm(0, 0, 0)
        assert bool(failed) == (error is not None), (library, count, error)
        for found, expected in zip(call(), wanted, strict=True):
            assert torch.equal(found, expected), (library, count)
        if not failed:
            return count
        count += 1


def op_calls() -> dict[str, Callable[[], list[torch.Tensor]]]:
    tensors = small_tensors(MonkeyPatch())

    def call(name: str) -> Callable[[], list[torch.Tensor]]:
        op = getattr(import_module(f"pyglobenc.ops.{name}"), name)
        args = OP_TABLE[name].arguments(tensors)
        return lambda: list(flatten(op(*args, backend="cpu")))

    return {name: call(name) for name in ops_of("cpu")}


def model_calls() -> dict[str, Callable[[], list[torch.Tensor]]]:
    # Calls of ops need no transformers, whose import takes longer than they do.
    from models import build, random_batch

    from pyglobenc import GlobEnc, TransformerAttribution

    def call(method: type, name: str) -> Callable[[], list[torch.Tensor]]:
        attribute = method(build(name, torch.float32))
        batch = random_batch(attribute.model, 2, 9, pads=[0, 3])
        return lambda: [attribute(**batch).scores]

    return {
        f"{method.__name__} {name}": call(method, name)
        for method, name in (
            (GlobEnc, "bert"),
            (GlobEnc, "llama"),
            (TransformerAttribution, "bert-classifier"),
        )
    }


def main(kind: str, threads: str = "1", *sets: str) -> None:
    torch.set_num_threads(int(threads))
    allocator = ctypes.CDLL(None)
    allocator.arm.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_long]
    # A model's call allocates some thousand times.
    calls, step, counts = (op_calls(), 1, {}) if kind == "ops" else (model_calls(), 37, {})
    for used in sets or kernels.instruction_sets()[:1]:
        kernels.use(used)
        for name, call in calls.items():
            counts[f"{name} {used}"] = {
                library: failures(allocator, library, call, step) for library in (MODULE, TORCH)
            }
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])

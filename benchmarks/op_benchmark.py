"""One benchmark for every op: its backends, torch.compile of its reference, and the algorithm that materialises, on one encoder layer.

BERT-base's shape, float32, one example of n tokens. Right before fast: each is compared with the float64 reference before it is timed.
"""

from importlib import import_module

import pytest
import torch
from allocations import measure_allocations

from pyglobenc.backends import INTERPRETED
from pyglobenc.commands.trial import DH, EXAMPLES, H, tensors
from pyglobenc.costs import count, flatten, synchronize

LENGTHS = (128, 512, 2048)
# beside the op's backends: what a user could have without them
COMPILED, MATERIALISED = "compile", "materialised"
# the compiler takes up to a minute a shape
COMPILED_LENGTHS = (512,)
# half a float32's digits: what is compared is the same quantity, not its last bits
TOLERANCE = 1e-3
ROUNDS, SHORT = 15, 1e-4


def cases(op: str, materialised_lengths: tuple[int, ...] = ()):
    """Decorator: n and backend of every benchmark of an op."""
    backends = import_module(f"pyglobenc.ops.{op}").BACKENDS
    pairs = [(n, name) for n in LENGTHS for name in backends]
    pairs += [(n, COMPILED) for n in COMPILED_LENGTHS] + [(n, MATERIALISED) for n in materialised_lengths]
    return pytest.mark.parametrize("n, backend", sorted(pairs))


def run(benchmark, op, n, backend, materialised=None):
    """Time one case; materialised takes the op's positional arguments and returns what the op returns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backend == "triton" and INTERPRETED:
        pytest.skip("interpreted kernels show what they compute, not how fast")
    args = EXAMPLES[op](tensors(device.type, n))
    call = {COMPILED: compiled, MATERIALISED: lambda op, args: lambda: materialised(*args)}.get(backend, named(backend))(op, args)
    try:
        result = call()
    except (ValueError, NotImplementedError) as error:
        pytest.skip(str(error))
    check(op, n, args, result)
    cost = count(op, args, result, batch=1, heads=H, n=n, dh=DH)
    benchmark.extra_info.update(flops=f"{cost.flops:.6g}", exps=f"{cost.exps:.6g}", bytes=f"{cost.bytes:.6g}", dtype="float32")
    benchmark.extra_info["peak_mb"] = f"{peak_mb(call, device):.3f}"
    time_it(benchmark, call, device)


def named(backend):
    def build(op, args):
        function = getattr(import_module(f"pyglobenc.ops.{op}"), op)
        return lambda: function(*args, backend=backend)

    return build


def compiled(op, args):
    """torch.compile of the reference on the arguments that the op hands to it."""
    module, function = import_module(f"pyglobenc.ops.{op}"), getattr(import_module(f"pyglobenc.reference.{op}"), op)
    seen, pick = [], module.pick
    module.pick = lambda *ignored: lambda *raw: (seen.append(raw), function(*raw))[1]
    try:
        getattr(module, op)(*args, backend="reference")
    finally:
        module.pick = pick
    faster = torch.compile(function)
    return lambda: faster(*seen[0])


def check(op, n, args, result):
    """Every array of the result against the float64 reference, relative to its largest entry: within TOLERANCE, or, where the op
    divides by what cancels, as near as the reference comes in float32."""
    if n > max(COMPILED_LENGTHS):
        return

    def widen(part):
        return part.double() if isinstance(part, torch.Tensor) else [widen(one) for one in part]

    function = getattr(import_module(f"pyglobenc.ops.{op}"), op)
    exact, plain = function(*widen(args), backend="reference"), function(*args, backend="reference")
    for ours, torch_own, best in zip(flatten(result), flatten(plain), flatten(exact), strict=True):
        error, allowed = (float((t.reshape(best.shape).double() - best).abs().amax() / best.abs().amax()) for t in (ours, torch_own))
        assert error < max(TOLERANCE, 4 * allowed), f"{op}: off by {error:.1e} of the largest entry, plain float32 by {allowed:.1e}"


def peak_mb(call, device):
    """MiB above what was there before, at the call's worst moment."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return measure_allocations(call).peak / 2**20


def time_it(benchmark, call, device):
    """Short calls several times a round, so that the clock isn't what is measured."""
    from pyglobenc.ceilings import times

    once = min(times(call, device, 0))
    repeats = max(1, round(SHORT / once))

    def several():
        for _ in range(repeats):
            call()
        synchronize(device)

    benchmark.extra_info["calls_a_round"] = repeats
    benchmark.pedantic(several, rounds=ROUNDS if once < 1 else 3, iterations=1, warmup_rounds=1)

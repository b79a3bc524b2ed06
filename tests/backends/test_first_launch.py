"""One small case of every op on each GPU backend: what is run first on a GPU, also under its sanitizers.

Without a GPU the Triton kernels are interpreted here, and tests/cuda emulates those in CUDA C++.
"""

from importlib import import_module
from typing import Any

import pytest
import torch
from numerics import ENOUGH, Pool

from pyglobenc import ops
from pyglobenc.backends.cuda import _extension
from pyglobenc.bench.costs import flatten
from pyglobenc.bench.example_inputs import op_names, tensors
from pyglobenc.bench.op_table import OP_TABLE

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# A tensor core cuts sums off, where float32 rounds them: twice torch's own error.
FACTOR = 4.0 if ON_GPU else 2.0
KERNELS = [
    (op, backend)
    for op in op_names()
    for backend in ("triton", "cuda")
    if backend in import_module(f"pyglobenc.ops.{op}").BACKENDS
]


def example(n: int) -> dict[str, torch.Tensor]:
    """Return the ops' example inputs. Scores are exact: divisions by rounded ones would differ at will."""
    made = dict(tensors(DEVICE, n))
    made |= {name: (made[name] * 2).round() / 2 for name in "qk"}
    made["o"], made["lse"] = ops.attention(made["q"], made["k"], made["v"])
    return made


def widened(part: Any) -> Any:
    return part.double() if isinstance(part, torch.Tensor) else [widened(one) for one in part]


@pytest.mark.parametrize("op, backend", KERNELS)
def test_op(op, backend):
    if backend == "cuda":
        if not ON_GPU:
            pytest.skip("needs a GPU")
        assert _extension.kernels is not None, _extension.missing
    function, args = getattr(ops, op), OP_TABLE[op].arguments(example(64 if ON_GPU else 5))
    runs = (args, backend), (widened(args), "reference"), (args, "reference")
    results = [list(flatten(function(*given, backend=name))) for given, name in runs]
    pool = Pool(FACTOR)
    for found in zip(*results, strict=True):
        pool.add(*found)
    if pool.size < ENOUGH:
        # The rule needs more numbers. Sums of a few hundred products round by less than this.
        assert torch.cat(pool.ours).max() < 2.0**-14
    else:
        pool.judge()

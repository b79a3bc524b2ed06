"""Every op has all that belongs to it; a failure names what is missing."""

from importlib import import_module
from pathlib import Path

import pytest

from pyglobenc import ops
from pyglobenc.backends.dispatch import ROOMS
from pyglobenc.bench.example_inputs import op_names, tensors
from pyglobenc.bench.op_table import OP_TABLE, Shape

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "reference": ROOT / "pyglobenc/backends/reference",
    "cpu": ROOT / "pyglobenc/backends/cpu",
    "triton": ROOT / "kernels/fused",
    "cuda": ROOT / "pyglobenc/backends/cuda",
}


def test_the_table_lists_the_ops_that_have_backends():
    assert sorted(OP_TABLE) == sorted(op_names())


@pytest.mark.parametrize("op", op_names())
def test_an_op_has_all_that_belongs_to_it(op):
    named = import_module(f"pyglobenc.ops.{op}").BACKENDS
    missing = [
        str(folder / f"{op}.py")
        for name, folder in FOLDERS.items()
        if name in named and not (folder / f"{op}.py").exists()
    ]
    missing += [
        name
        for name in (f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py")
        if not (ROOT / name).exists()
    ]
    missing += [] if op in ops.__all__ else [f"{op} in pyglobenc.ops.__all__"]
    assert not missing
    assert set(named) <= set(ROOMS) and named[-1] == "reference"


@pytest.mark.parametrize("op", op_names())
def test_the_table_s_arguments_and_counts_are_the_op_s(op):
    entry = OP_TABLE[op]
    getattr(ops, op)(*entry.arguments(tensors("cpu", 8)), backend="reference")
    assert entry.multiply_adds(Shape(1, 12, 512, 64)) >= entry.multiply_adds(Shape(1, 12, 64, 64)) >= 0

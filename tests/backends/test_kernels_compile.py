"""What each Triton kernel compiles to for GPUs that need not be there: no spills, shared memory within the
card's limit.
"""

import csv
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import fields, is_dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from kernel_resources import arguments, pretend, record, specialised

from pyglobenc.kernels._device import SHARED_LIMITS, SMALLEST_LIMIT

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "build" / "kernel_resources.csv"
AMD = "gfx942"
CAPABILITIES = (80, 90, 100, AMD)
if "PYGLOBENC_CUDA_ARCHS" in os.environ:
    CAPABILITIES = tuple(map(int, os.environ["PYGLOBENC_CUDA_ARCHS"].split(",")))
LIMITS = SHARED_LIMITS | {AMD: SMALLEST_LIMIT}

# BERT-base, Llama-like, and the ends of what is taken: heads, key-value heads, head size, dtype, rows
BERT = (12, 12, 64, "bfloat16", 1)
SHAPES = [
    BERT,
    (12, 12, 64, "bfloat16", 24),
    (12, 12, 64, "float32", 1),
    (32, 8, 128, "bfloat16", 1),
    (32, 8, 128, "float32", 24),
    (64, 8, 256, "bfloat16", 1),
    (4, 4, 256, "bfloat16", 1),
]
# no products of matrices
ELEMENTWISE = ("clone_relevance", "add_relevance", "linear_relevance", "exp", "mapped_square")
HEADS = [(12, 12, 64, "float32", 1), (16, 16, 80, "float32", 24), (4, 4, 256, "float32", 1)]


def cases() -> list[dict]:
    """Every optional argument on, padding and packed sequences by turns where they exclude each other; tf32,
    which a caller may ask for, no packed sequences, and all off for one shape.
    """
    out = []
    for capability in CAPABILITIES:

        def case(op, shape, precision="tf32x3", full=True, packed=True, capability=capability):
            names = ("heads", "kv_heads", "head_dim", "dtype", "rows")
            chosen = dict(op=op, capability=capability, precision=precision, full=full, packed=packed)
            out.append(chosen | dict(zip(names, shape, strict=True)))

        if capability == AMD:
            for op in ("rollout_step", "pair_norms"):
                case(op, BERT, precision="ieee")
            for op in (
                *ELEMENTWISE,
                "relevance_attention",
                "relevance_maps",
                "head_gram",
                "head_norms",
                "proximity",
            ):
                case(op, HEADS[0], precision="ieee", packed=False)
            for op in ("add_relevance", "relevance_attention"):
                case(op, HEADS[0], precision="ieee")
            continue
        for shape in SHAPES:
            case("rollout_step", shape)
        for op in (*ELEMENTWISE, "relevance_maps"):
            case(op, HEADS[0], packed=False)
        case("add_relevance", HEADS[0])
        for packed in (True, False):
            for shape in HEADS:
                case("relevance_attention", shape, packed=packed)
            case("relevance_rollout_step", HEADS[0], packed=packed)
        for shape in (HEADS[0], HEADS[-1], BERT, (12, 12, 64, "float16", 1)):
            case("head_gram", shape)
        case("head_norms", HEADS[0])
        for shape in (HEADS[1], (32, 8, 128, "bfloat16", 24), (64, 8, 256, "bfloat16", 24)):
            case("proximity", shape)
        case("proximity", BERT, full=False)
        case("mapped_square", BERT)
        case("pair_norms", BERT)
        case("rollout_step", BERT, precision="tf32")
        case("rollout_step", BERT, packed=False)
        case("pair_norms", BERT, full=False)
    return out


@pytest.fixture(scope="module")
def resources():
    """Rows of the table, compiled in processes that don't interpret Triton."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, Path(__file__).parents[1] / "support" / "kernel_resources.py"]
    todo = cases()
    count = min(os.cpu_count() or 1, 8)
    shares = [todo[start::count] for start in range(count)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [subprocess.Popen(command, env=env, **pipes) for _ in shares]
    for process, share in zip(running, shares, strict=True):
        process.stdin.write("".join(json.dumps(case) + "\n" for case in share))
        process.stdin.close()
        process.stdin = None
    rows = []
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        rows += [row for line in out.splitlines() for row in json.loads(line)]
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return rows


@pytest.mark.slow
def test_nothing_spills(resources):
    assert [row for row in resources if row["spilled"]] == []


@pytest.mark.slow
def test_shared_memory_fits(resources):
    assert [row for row in resources if row["shared"] > LIMITS[row["capability"]]] == []


@pytest.mark.slow
def test_products_run_on_tensor_cores(resources):
    # Heads that are compared alone have no products of matrices.
    without = [
        row
        for row in resources
        if row["op"] in ELEMENTWISE or row["kernel"] == "_finish_kernel" or row.get("BLOCK_H") == 1
    ]
    assert [row for row in resources if bool(row["mma"]) == (row in without)] == []


@pytest.mark.slow
def test_every_kernel_was_compiled(resources):
    source = "".join(path.read_text() for path in (ROOT / "kernels" / "fused").glob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE))
    for capability in CAPABILITIES:
        assert {row["kernel"] for row in resources if row["capability"] == capability} == kernels


def with_batch(argument: Any, batch: int) -> Any:
    """An argument for two examples as one for another number of them; weights stay."""
    if is_dataclass(argument):
        return replace(
            argument, **{f.name: with_batch(getattr(argument, f.name), batch) for f in fields(argument)}
        )
    if isinstance(argument, torch.Tensor) and argument.shape[0] == 2:
        return argument.new_empty(batch, *argument.shape[1:])
    return argument


def variant(kernel, args: tuple, kwargs: dict) -> tuple:
    """What Triton looks at in a launch to tell whether it has compiled that already."""
    parameters = signature(kernel.fn).parameters
    given = dict(zip(parameters, args, strict=False)) | kwargs
    # where a kernel is interpreted, its options lie apart
    loosely = getattr(kernel, "kwargs", vars(kernel))["do_not_specialize"] or ()
    constant = {name for name, parameter in parameters.items() if parameter.annotation is tl.constexpr}
    return tuple(
        given[name] if name in constant else specialised(given[name], name not in loosely)
        for name in parameters
    )


@pytest.mark.parametrize(
    "op",
    "rollout_step pair_norms head_gram head_norms mapped_square proximity".split()
    + ["relevance_attention", "relevance_maps"],
)
def test_a_corpus_compiles_a_kernel_a_few_times(op):
    case, found = (
        dict(op=op, heads=12, kv_heads=12, head_dim=64, dtype="float32", rows=1, full=True, packed=False),
        defaultdict(set),
    )
    with pretend(90, "tf32x3"):
        for n in (2, 3, 4, 7, 16, 17, 31, 32, 63, 100, 128, 256, 402, 511, 512):
            for batch in (1, 2, 3, 16, 48):
                args = tuple(with_batch(argument, batch) for argument in arguments(case, n))
                for kernel, *launch in record(op, args):
                    found[kernel].add(variant(kernel, *launch))
    assert max(map(len, found.values())) <= 3

"""What each Triton kernel compiles to for GPUs that need not be there: no spills, shared memory within the card's limit."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyglobenc.kernels._device import SHARED_LIMITS

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "build" / "kernel_resources.csv"
CAPABILITIES = (80, 90, 100)

# BERT-base, MiniLM, ViT-H, Llama-like, and the ends of what is taken: heads, key-value heads, head size, dtype, rows
SHAPES = [
    (12, 12, 64, "bfloat16", 1),
    (12, 12, 64, "bfloat16", 24),
    (12, 12, 64, "float32", 1),
    (12, 12, 32, "float16", 1),
    (16, 16, 80, "bfloat16", 1),
    (32, 8, 128, "bfloat16", 1),
    (32, 8, 128, "float32", 24),
    (64, 8, 256, "bfloat16", 1),
    (4, 4, 256, "bfloat16", 1),
]


def cases() -> list[dict]:
    """One launch each, every optional argument on; tf32 where its tile differs and a caller may ask for it."""
    out = []
    for capability in CAPABILITIES:
        for heads, kv_heads, head_dim, dtype, rows in SHAPES:
            case = dict(capability=capability, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, rows=rows, full=True)
            out.append({**case, "op": "rollout_step", "precision": "tf32x3"})
        first = {**out[-len(SHAPES)]}
        out += [{**first, "precision": "tf32"}, {**first, "op": "token_norms"}, {**first, "op": "token_norms", "full": False}]
    return out


@pytest.fixture(scope="module")
def resources():
    """Rows of the table, compiled in two processes that don't interpret Triton."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("kernel_resources.py")]
    todo = cases()
    halves = [todo[::2], todo[1::2]]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = [subprocess.Popen(command, env=env, **pipes) for _ in halves]
    for process, half in zip(running, halves, strict=True):
        process.stdin.write("".join(json.dumps(case) + "\n" for case in half))
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


def test_nothing_spills(resources):
    assert [row for row in resources if row["spilled"]] == []


def test_shared_memory_fits(resources):
    assert [row for row in resources if row["shared"] > SHARED_LIMITS[row["capability"]]] == []


def test_products_run_on_tensor_cores(resources):
    assert [row for row in resources if not row["mma"]] == []


def test_every_case_was_compiled(resources):
    assert len(resources) == len(cases()) and {row["capability"] for row in resources} == set(CAPABILITIES)

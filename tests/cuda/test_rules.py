"""The elementwise relevance rules in CUDA C++: emulated where there is no GPU."""

from types import SimpleNamespace

import pytest
import torch
from test_kernels_rules import (  # noqa: F401
    check,
    linear,
    random,
    test_add,
    test_add_of_both_signs_is_the_reference,
    test_add_packed,
    test_clone,
    test_clone_guard,
    test_empty,
    test_linear,
    test_linear_is_recorded_as_it_runs,
    test_linear_with_nearly_dead_outputs,
    test_linear_with_outputs_dead_for_one_token,
    test_refuses_with_reasons,
    test_strided,
)

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda.linear_relevance import run as launch
from pyglobenc.ops import add_relevance, clone_relevance, linear_relevance


@pytest.fixture(autouse=not torch.cuda.is_available())
def without_a_gpu(emulated):
    return emulated


@pytest.fixture
def backend():
    return "cuda"


def test_add_of_more_tiles_than_blocks(backend):
    check(backend, add_relevance, lambda: {name: random(1, 259, 1024).abs() + 0.1 for name in "rab"})


def test_linear_of_more_strips_than_lanes_and_warps(backend):
    args = linear(1, 1, 1100, 4200)
    args["x"] = args["x"].abs() + 0.1
    for dead in (5, 4199):
        args["weight"][dead] = -args["weight"][dead].abs() - 0.01
        args["weight"][dead, 1] = args["weight"][dead, -1] = 1e-3
    check(backend, linear_relevance, lambda: args)


def test_linear_reads_nothing(monkeypatch):
    # meta tensors have no values to read
    r, x, weight = (torch.empty(*shape, device="meta") for shape in ((2, 5, 4), (2, 5, 3), (4, 3)))
    idle = SimpleNamespace(
        LINEAR_STRIP=128, linear_quotient=lambda *args: None, linear_product=lambda *args: None
    )
    monkeypatch.setattr(_extension, "kernels", idle)
    assert launch(r, x, weight).shape == x.shape


@pytest.mark.parametrize("shape", [(2, 7, 13), (3, 5, 16)], ids=str)
def test_any_alignment(shape, backend):
    """Contiguous tensors that start in the middle of 16 bytes, and whose examples do."""
    r, a, b = (random(*shape) for _ in range(3))
    weight = random(9, shape[2])
    y, bias = a @ weight.T, random(9)

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def results(r, a, b, y):
        yield clone_relevance([r, a], b, backend=backend)
        yield from add_relevance(r, a, b, backend=backend)
        yield linear_relevance(y, a, weight, output=y, bias=bias, backend=backend)

    assert all(
        torch.equal(*pair)
        for pair in zip(results(r, a, b, y), results(*map(shifted, (r, a, b, y))), strict=True)
    )

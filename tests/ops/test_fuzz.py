"""Ops on arguments changed at random: the result has the reference's shape, dtype and NaN, or an error says
what is wrong.
"""

import pytest
from fuzz import check, ops_of, small_tensors
from pair_cases import KERNELS, running


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", ops_of("cpu"))
def test_changed_arguments(op, kernel, count, monkeypatch):
    tensors = small_tensors(monkeypatch)
    with running(kernel) as backend:
        check(op, backend, tensors, count)

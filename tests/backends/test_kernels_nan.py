"""NaN and infinity in the arguments of ops: no kernel of the GPU backends turns them into numbers.

The CUDA backend takes these tests over in cuda/test_nan.py.
"""

import pytest
import torch
from fuzz import check_nan, ops_of, small_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def backend():
    return "triton"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("count", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", ops_of("triton"))
def test_nan_is_kept(op, count, backend, monkeypatch):
    check_nan(op, backend, small_tensors(monkeypatch, DEVICE), count)

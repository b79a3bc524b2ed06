"""NaN and infinity in the arguments of CUDA ops: emulated where there is no GPU."""

import pytest
import torch
from test_kernels_nan import test_nan_is_kept  # noqa: F401


@pytest.fixture(autouse=not torch.cuda.is_available())
def without_a_gpu(emulated):
    return emulated


@pytest.fixture
def backend():
    return "cuda"

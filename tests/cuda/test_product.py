"""Products with the map of attention in CUDA C++: emulated where there is no GPU."""

import pytest
import torch
from test_kernels_product import (  # noqa: F401
    test_empty,
    test_is_as_good_as_torch,
    test_padding_is_never_read,
    test_strided,
)


@pytest.fixture(autouse=not torch.cuda.is_available())
def kernels(emulated):
    return emulated


@pytest.fixture
def backend():
    return "cuda"

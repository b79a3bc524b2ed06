"""`head_gram`, `head_norms`, `mapped_square` and `proximity` in CUDA C++: emulated where there is no GPU."""

import pytest
import torch
from test_kernels_values import (  # noqa: F401
    test_empty,
    test_head_gram,
    test_head_norms,
    test_head_norms_whose_squares_float32_does_not_hold,
    test_heads_of_one_feature,
    test_heads_without_features,
    test_mapped_square,
    test_mapped_square_of_what_lies_apart,
    test_proximity,
    test_proximity_of_what_lies_apart,
    test_refuses_with_reasons,
    test_strided,
)


@pytest.fixture(autouse=not torch.cuda.is_available())
def without_a_gpu(emulated):
    return emulated


@pytest.fixture
def backend():
    return "cuda"

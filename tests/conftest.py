"""The set-up of every test: a fixed seed, new memory filled with NaN, and Triton interpreted on a CPU."""

import os

import torch

if not torch.cuda.is_available():
    # triton reads this variable when it is imported, and transformers imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from numerics import SEED


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(SEED)
    # Tensors are small, so a second thread mostly waits at barriers, which takes long on a busy machine.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

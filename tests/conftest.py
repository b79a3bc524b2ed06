"""The set-up of every test: a fixed seed, new memory filled with NaN, and Triton interpreted on a CPU."""

import os

import torch

if not torch.cuda.is_available():
    # triton reads this variable when it is imported, and transformers imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import pytest
from numerics import SEED

if not torch.cuda.is_available():
    interpreter.hasten()

# Fixtures that take many seconds. With pytest-xdist, one process makes each of them for all of its tests.
COSTLY = {"emulated_module", "every_output", "resources", "wheel"}


def pytest_collection_modifyitems(items):
    for item in items:
        for name in COSTLY.intersection(item.fixturenames):
            place = "cuda" if name == "emulated_module" else item.path.stem
            item.add_marker(pytest.mark.xdist_group(place))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(SEED)
    # Tensors are small, so a second thread mostly waits at barriers, which takes long on a busy machine.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

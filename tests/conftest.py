"""The set-up of every test: a fixed seed, new memory filled with NaN, and Triton interpreted on a CPU."""

import os
import sys

# Many tests start processes that import torch and transformers. Without files of bytecode, each process would
# compile all that it imports, which takes longer than most tests.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import torch

if not torch.cuda.is_available():
    # triton reads this variable when it is imported, and transformers imports triton.
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import pytest
from numerics import SEED

if not torch.cuda.is_available():
    interpreter.hasten()

# These tests share fixtures that take many seconds. With pytest-xdist, one process runs all of a line.
TOGETHER = (
    "backends/test_kernels_compile.py",
    "cuda/test_compile.py",
    "cuda/",
    "integrations/test_ray.py",
    "scale/test_distributed.py",
    "test_packaging.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


# xdist's own groups have no effect since pytest 9.2, because they change a test's id.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((group for group in TOGETHER if f"tests/{group}" in nodeid), nodeid)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    torch.manual_seed(SEED)
    # Tensors are small, so a second thread mostly waits at barriers, which takes long on a busy machine.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

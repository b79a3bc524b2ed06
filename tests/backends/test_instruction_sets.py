"""Which instruction set of the CPU kernels is chosen, and which can be asked for."""

from pathlib import Path

import pytest
import torch
from pair_cases import KERNELS, SETS, Case, pair_args

from pyglobenc.backends.dispatch import load
from pyglobenc.ops import pair_norms

pytestmark = pytest.mark.skipif(bool(KERNELS[0].marks), reason="the compiled module is missing")


@pytest.fixture
def kernels():
    """Return the compiled module, whose instruction set is restored after the test."""
    module = load("pair_norms", "cpu")[0].kernels
    before = module.instruction_set()
    yield module
    module.use(before)


def test_the_first_set_is_in_use(kernels):
    assert kernels.instruction_set() == kernels.instruction_sets()[0]


def test_products_of_bfloat16_are_chosen_where_they_pay(kernels):
    here = kernels.instruction_sets()
    if not {"avx512", "avx512bf16"} <= set(here):
        pytest.skip("needs a processor with products of bfloat16")
    pays = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert (here.index("avx512bf16") < here.index("avx512")) == pays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_takes_no_tiles(kernels, dtype):
    if not {"amx", "avx512"} <= set(kernels.instruction_sets()):
        pytest.skip("needs a processor with tile registers")
    given, found = pair_args(Case(n=65, dh=32, dtype=dtype)), []
    for name in ("amx", "avx512"):
        kernels.use(name)
        found.append(pair_norms(**given, backend="cpu"))
    assert torch.equal(*found) == (dtype == torch.float32)


def test_every_set_of_this_machine_can_be_asked_for(kernels):
    for name in kernels.instruction_sets():
        kernels.use(name)
        assert kernels.instruction_set() == name


@pytest.mark.parametrize("name", [*SETS, "Avx2", ""])
def test_other_sets_are_refused(kernels, name):
    if name in kernels.instruction_sets():
        pytest.skip("this machine has it")
    before = kernels.instruction_set()
    with pytest.raises(ValueError, match=f"instruction set {name} is not available on this machine"):
        kernels.use(name)
    assert kernels.instruction_set() == before

"""The primitives that the kernels are written in: where lanes hold what, by the tables of the PTX ISA, and
what the emulator finds.

On a GPU the same kernels run there.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import emulator
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOURCE = Path(__file__).with_name("primitives.cu")
NOTHING, BARRIER, WARP_BARRIER, SHUFFLE, HALF_A_BARRIER = range(5)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("primitives")
    if DEVICE == "cpu":
        return ctypes.CDLL(str(emulator.link([emulator.COMMON / "races.cpp", SOURCE], folder)))
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    path, arch = folder / "primitives.so", "".join(map(str, torch.cuda.get_device_capability()))
    command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-shared", "-Xcompiler", "-fPIC", SOURCE, "-o", path]
    subprocess.run(list(map(str, command)), check=True)
    return ctypes.CDLL(str(path))


def call(function, *args) -> str:
    """Run it on tensors and integers; what went wrong."""
    error = ctypes.create_string_buffer(200)
    function(
        error,
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a) for a in args),
    )
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return error.value.decode()


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"; groupID is lane / 4,
# threadID_in_group lane % 4
def a_16(lane, i):
    row = lane // 4 if 0 <= i < 2 or 4 <= i < 6 else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1) + (0 if i < 4 else 8)


def b_16(lane, i):
    return lane % 4 * 2 + (i & 1) + (0 if i < 2 else 8), lane // 4


def c_16(lane, i):
    return lane // 4 if i < 2 else lane // 4 + 8, lane % 4 * 2 + (i & 1)


# "Matrix Fragments for mma.m16n8k8", of .tf32; c is as above
def a_8(lane, i):
    return lane // 4 if i in (0, 2) else lane // 4 + 8, lane % 4 if i < 2 else lane % 4 + 4


def b_8(lane, i):
    return lane % 4 if i == 0 else lane % 4 + 4, lane // 4


def held(matrix, entry, count):
    """What each lane holds of a matrix: (32, count) elements, element i at entry(lane, i)."""
    rows, columns = torch.tensor([[entry(lane, i) for i in range(count)] for lane in range(32)]).unbind(-1)
    return matrix[rows, columns].to(DEVICE)


@pytest.mark.parametrize(
    "kind, dtype", [(0, torch.bfloat16), (1, torch.float16), (2, torch.float32)], ids=["bf16", "f16", "tf32"]
)
def test_mma_multiplies_what_the_tables_say(library, kind, dtype):
    a, b, depth = (a_8, b_8, 8) if dtype == torch.float32 else (a_16, b_16, 16)
    # small integers: every order of the sum is exact
    left, right, start = (torch.randint(-9, 10, shape) for shape in ((16, depth), (depth, 8), (16, 8)))
    sums = held(start.float(), c_16, 4)
    assert (
        call(
            library.run_mma,
            kind,
            held(left.to(dtype), a, depth // 2),
            held(right.to(dtype), b, depth // 4),
            sums,
        )
        == ""
    )
    assert torch.equal(sums, held((left @ right + start).float(), c_16, 4))


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_the_table_says(library, transposed):
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.empty(32, 4, 2, dtype=torch.int16, device=DEVICE)
    assert call(library.run_load, matrices.to(DEVICE), out, transposed) == ""
    # "ldmatrix": a lane's register m holds row lane / 4 of matrix m, entries lane % 4 * 2 and the next
    rows, columns = torch.arange(32)[:, None] // 4, torch.arange(32)[:, None] % 4 * 2 + torch.arange(2)
    expected = (matrices.mT if transposed else matrices)[:, rows, columns]
    assert torch.equal(out.cpu(), expected.transpose(0, 1))


def exchange(library, between, ahead=1, copied=False, read_first=False):
    given, out = torch.rand(64, device=DEVICE), torch.empty(64, device=DEVICE)
    return call(library.run_exchange, given, out, between, ahead, copied, read_first), given, out


@pytest.mark.parametrize("copied", [False, True])
def test_a_barrier_shows_what_others_wrote(library, copied):
    error, given, out = exchange(library, BARRIER, 33, copied)
    assert error == "" and torch.equal(out, given.roll(-33))


@pytest.mark.skipif(DEVICE == "cuda", reason="races are found by the emulator")
@pytest.mark.parametrize("read_first", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("between, ahead", [(NOTHING, 1), (WARP_BARRIER, 33), (SHUFFLE, 1)])
def test_races_are_found(library, between, ahead, copied, read_first):
    assert "race with thread" in exchange(library, between, ahead, copied, read_first)[0]
    assert exchange(library, BARRIER, ahead, copied, read_first)[0] == ""


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU memory holds anything, and threads may wait for ever")
def test_the_emulator_hurts(library):
    error, _, out = exchange(library, BARRIER, 0, read_first=True)
    assert error == "" and out.isnan().all()
    assert "wait for others that never come" in exchange(library, HALF_A_BARRIER, 0)[0]

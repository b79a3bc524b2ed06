"""Products of matrices on tile registers, which take the place of torch's where the processor has them."""

import pytest
import torch
from numerics import assert_as_good_as_torch
from pair_cases import KERNELS, assert_threads_change_nothing, factor, running

from pyglobenc.backends.dispatch import load

TILES = pytest.mark.skipif(bool(KERNELS[0].marks), reason="the compiled module is missing")
pytestmark = TILES
# Sizes of a and b: whole tiles and parts of them, several panels of columns, and more rows than are packed at
# a time.
SIZES = [(64, 64, 64), (67, 70, 81), (64, 512, 96), (70, 300, 290), (1030, 64, 65)]
HALVES = (torch.bfloat16, torch.float16)


def multiply(a, b, copies=1, absolute=(False, False), threads=2):
    """Return a b, and with two copies also a |b|; None if the kernel leaves the product to torch."""
    out = torch.empty(copies, len(a), b.shape[1])
    kernels = load("linear_relevance", "cpu")[0].kernels
    return out if kernels.matmul(a, absolute[0], b, absolute[1], out, threads) else None


def on_tiles(kernel):
    """Skip a test of an instruction set without tiles, where the kernel leaves every product to torch."""
    if kernel != "cpu-amx":
        assert multiply(torch.ones(2, 2), torch.ones(2, 2)) is None
        pytest.skip("an instruction set without tile registers")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows, terms, columns", SIZES)
def test_matmul_is_as_good_as_torch(rows, terms, columns, dtype, turned, kernel):
    with running(kernel):
        on_tiles(kernel)
        a, b = torch.randn(rows, terms), torch.randn(terms, columns)
        # Rows may have any size.
        a *= 10.0 ** torch.randint(-30, 30, (rows, 1))
        b = (b.T.contiguous().T if turned else b).to(dtype)
        for absolute in ((False, False), (True, True)):
            left, right = (t.abs() if one else t for t, one in zip((a, b.float()), absolute, strict=True))
            signed, positive = multiply(a, b, copies=2, absolute=absolute)
            for out, other in ((signed, right), (positive, right.abs())):
                sizes = left.double().norm(dim=1, keepdim=True)
                exact, plain = left.double() @ other.double() / sizes, (left @ other).double() / sizes
                assert_as_good_as_torch(out.double() / sizes, exact, plain, factor(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_and_columns_of_zeros(kernel):
    with running(kernel):
        on_tiles(kernel)
        a, b = torch.randn(40, 50), torch.randn(50, 60)
        a[3], b[:, 5] = 0, 0
        (out,) = multiply(a, b)
    assert not out[3].any() and not out[:, 5].any() and out[4, 6] != 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-39, 1e-34, 1e32])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_would_lose_digits_are_left_to_torch(side, value, kernel):
    with running(kernel):
        on_tiles(kernel)
        given = [torch.randn(40, 50), torch.randn(50, 60)]
        # One row of a, or one column of b, has this size.
        (given[0][7] if side == 0 else given[1][:, 7]).fill_(value)
        # Rows of a are scaled, so that only subnormal numbers have too few digits.
        scaled = side == 0 and value in (1e-34, 1e32)
        assert (multiply(*given) is None) != scaled


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_change_no_rows(kernel):
    a, b = torch.randn(70, 300), torch.randn(300, 290)

    def call(backend):
        out = multiply(a, b, threads=torch.get_num_threads())
        return torch.zeros(1) if out is None else out

    assert_threads_change_nothing(kernel, call)

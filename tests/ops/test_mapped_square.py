import pytest
import torch
from direct import stage_matrix
from numerics import assert_as_good_as_torch
from pair_cases import KERNELS, running, spread

from pyglobenc.ops import mapped_square

HALF = (torch.bfloat16, torch.float16)


def arguments(*shape, norms):
    """x and the gammas of a stage, in float64; x off centre, as residuals are."""
    x = torch.randn(shape, dtype=torch.float64) + 0.5
    return x, [torch.rand(shape[-1], dtype=torch.float64) + 0.5 for _ in range(norms)]


@pytest.mark.parametrize("norms", [0, 1, 2])
def test_reference_is_the_definition(norms):
    x, gammas = arguments(2, 5, 17, norms=norms)
    out = mapped_square(x, gammas, backend="reference")
    torch.testing.assert_close(out, (x @ stage_matrix(17, gammas)).square().sum(-1))


@pytest.mark.parametrize("kernel", KERNELS[:1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("norms", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1000, 1, 16), (31, 33, 24), (16, 65, 35), (8, 130, 768)], ids=str)
def test_kernel_is_as_good_as_torch(shape, norms, dtype, kernel):
    x, gammas = arguments(*shape, norms=norms)
    x, gammas = x.to(dtype), [gamma.float() for gamma in gammas]
    with running(kernel) as backend:
        out = mapped_square(x, gammas, backend=backend)
        strided = mapped_square(spread(x), list(map(spread, gammas)), backend=backend)
    exact = mapped_square(x.double(), [gamma.double() for gamma in gammas], backend="reference")
    assert out.dtype == strided.dtype == torch.float32
    for found in (out, strided):
        # twice torch's: dividing by the squared product of the scales adds 5 roundings, each of up to 2^-24
        # of a whole row's result, where those of torch's sums average out
        assert_as_good_as_torch(found, exact, mapped_square(x, gammas, backend="reference"), 4.0)


@pytest.mark.parametrize("kernel", ["reference", *KERNELS[:1]])
def test_constant_rows_vanish(kernel):
    x, gamma = torch.full((1, 3, 8), 2.0), torch.rand(8) + 0.5
    with running(kernel) as backend:
        assert (
            not mapped_square(x, [gamma], backend=backend).any()
            and not mapped_square(x, [gamma, gamma], backend=backend).any()
        )


@pytest.mark.parametrize("kernel", KERNELS[:1])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(shape, kernel):
    with running(kernel) as backend:
        assert mapped_square(torch.zeros(shape), [torch.ones(4)] * 2, backend=backend).shape == shape[:2]


@pytest.mark.parametrize("kernel", KERNELS[:1])
@pytest.mark.parametrize("norms", [0, 2])
def test_double_precision_is_the_reference(norms, kernel):
    x, gammas = arguments(1, 2, 6, norms=norms)
    assert torch.equal(mapped_square(x, gammas), mapped_square(x, gammas, backend="reference"))
    with (
        running(kernel) as backend,
        pytest.raises(ValueError, match="computes in float32, got torch.float64"),
    ):
        mapped_square(x, gammas, backend=backend)


def test_arguments_are_checked():
    x, gammas = arguments(1, 2, 6, norms=2)
    with pytest.raises(ValueError, match="mapped_square: x must be"):
        mapped_square(x[0], gammas)
    with pytest.raises(ValueError, match=r"mapped_square: gammas\[1\] must be \(d\) with d=6, got \(5,\)"):
        mapped_square(x, [gammas[0], gammas[1][:5]])
    with pytest.raises(ValueError, match="at most 2 entries, got 3"):
        mapped_square(x, [*gammas, gammas[0]])
    for wrong in (x.float(), x.bfloat16()):
        with pytest.raises(TypeError, match="one dtype"):
            mapped_square(wrong, gammas)
    with pytest.raises(TypeError, match="one dtype"):
        mapped_square(x.bfloat16(), [gammas[0].float(), gammas[1].bfloat16()])


@pytest.mark.parametrize("norms", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, norms):
    x, gammas = arguments(2, 3, 6, norms=norms)
    torch.library.opcheck(
        torch.ops.pyglobenc.mapped_square.default, (x.to(dtype), [gamma.float() for gamma in gammas], "auto")
    )

"""The kernels' exponential, over every range that float32 has."""

import pytest
import torch
from pair_cases import KERNELS, load, running

LOWEST, HIGHEST = -87.33, 88.72  # results are normal between these


def exp(x, kernel):
    out = torch.empty_like(x)
    with running(kernel):
        load("pair_norms", "cpu")[0].kernels.exp(x, out)
    return out


@pytest.mark.parametrize("kernel", KERNELS)
def test_relative_error_is_the_one_stated(kernel):
    steps = torch.linspace(LOWEST, HIGHEST, 4_000_000)
    tiny = torch.logspace(-38, 1, 100_000)
    x = torch.cat([steps, tiny, -tiny])
    exact = x.double().exp()
    error = (exp(x, kernel).double() - exact).abs() / exact
    bound = 9e-8 + 3e-9 * x.abs()
    assert (error <= bound).all(), f"{error.max():.2e} at {x[error.argmax()]}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_underflow_is_gradual(kernel):
    x = torch.linspace(-110, LOWEST, 200_000)
    spacing = 2.0**-149
    relative = 9e-8 + 3e-9 * 110
    exact = x.double().exp()
    error = (exp(x, kernel).double() - exact).abs()
    assert (error <= 0.5 * spacing + relative * exact + 1e-60).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_limits(kernel):
    x = torch.tensor([-torch.inf, -1e30, -104.0, 0.0, -0.0, 88.73, 1e30, torch.inf])
    assert torch.equal(exp(x, kernel), torch.tensor([0, 0, 0, 1, 1, torch.inf, torch.inf, torch.inf]))
    assert exp(torch.tensor([torch.nan]), kernel).isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 15, 17, 33])
def test_every_length(count, kernel):
    x = torch.randn(count)
    torch.testing.assert_close(exp(x, kernel), x.exp())

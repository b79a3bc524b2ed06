import pytest
import torch
from numerics import assert_as_good_as_torch
from pair_cases import KERNELS, factor, running

from pyglobenc.backends.shared.safe_division import safe_divide
from pyglobenc.ops import linear_relevance


def inputs(rows, d_in, d_out, dead=0.0):
    """r, x, W and bias; a part of the outputs nearly dead: almost all contributions negative."""
    x, weight = torch.randn(2, rows, d_in), torch.randn(d_out, d_in)
    count = round(dead * d_out)
    weight[:count] = -weight[:count].abs()
    x[:, ::2] = x[:, ::2].abs() + 0.1
    if d_in > 1:
        weight[:count, 0] = 1e-4
    return torch.randn(2, rows, d_out), x, weight, torch.randn(d_out)


def clamped(r, x, weight):
    """The rule as published."""
    plus, minus = (lambda t: t.clamp(min=0)), (lambda t: t.clamp(max=0))
    s = safe_divide(r, plus(x) @ plus(weight).T + minus(x) @ minus(weight).T)
    return plus(x) * (s @ plus(weight)) + minus(x) * (s @ minus(weight))


CASES = [
    (500, 1, 1, 0.0),
    (100, 5, 7, 0.0),
    (17, 33, 65, 0.0),
    (40, 96, 200, 0.0),
    (40, 96, 200, 0.005),
    (40, 96, 200, 0.5),
    # more rows than are packed at a time, and several panels of columns
    (520, 70, 140, 0.005),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_clamped_rule(case):
    r, x, weight, bias = (t.double() for t in inputs(*case))
    expected = clamped(r, x, weight)
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        linear_relevance(r, x, weight, backend="reference"), expected, rtol=1e-7, atol=1e-9 * scale
    )
    output = x @ weight.T + bias
    out = linear_relevance(
        r, x, weight, abs_weight=weight.abs(), output=output, bias=bias, backend="reference"
    )
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_as_good_as_torch(case, known, kernel):
    r, x, weight, bias = inputs(*case)
    options = dict(output=x @ weight.T + bias, bias=bias, abs_weight=weight.abs()) if known else {}
    wide = {name: t.double() for name, t in options.items()}
    exact = linear_relevance(r.double(), x.double(), weight.double(), **wide, backend="reference")
    torch_out = linear_relevance(r, x, weight, **options, backend="reference")
    with running(kernel) as backend:
        out = linear_relevance(r, x, weight, **options, backend=backend)
        turned = linear_relevance(r.mT.contiguous().mT, x, weight, **options, backend=backend)
    assert_as_good_as_torch(out, exact, torch_out, factor(kernel))
    assert torch.equal(out, turned)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision_rows(dtype, kernel):
    r, x, weight, _ = inputs(40, 96, 200)
    weight = weight.to(dtype)
    exact, plain = (
        linear_relevance(r.to(wide), x.to(wide), weight, backend="reference")
        for wide in (torch.float64, torch.float32)
    )
    with running(kernel) as backend:
        out = linear_relevance(r, x, weight, backend=backend)
    assert_as_good_as_torch(out, exact, plain, factor(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows, d_in, d_out", [(0, 3, 4), (2, 3, 0)])
def test_empty(rows, d_in, d_out, kernel):
    with running(kernel) as backend:
        out = linear_relevance(
            torch.zeros(2, rows, d_out), torch.zeros(2, rows, d_in), torch.zeros(d_out, d_in), backend=backend
        )
    assert out.shape == (2, rows, d_in) and not out.any()

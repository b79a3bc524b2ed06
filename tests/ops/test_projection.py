"""Products of tokens with a direction, and their lengths, as the checks of the layers take them."""

import pytest
import torch
from numerics import assert_as_good_as_torch
from pair_cases import KERNELS, factor, running

from pyglobenc.backends.dispatch import load
from pyglobenc.hf.trace.projections import Directions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.skipif(bool(KERNELS[0].marks), reason="the compiled module is missing")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 700, 1), (3, 500, 37), (1, 1200, 515), (2, 4, 633, 9)], ids=str)
def test_rows_are_as_good_as_torch(shape, dtype, kernel):
    module = load("projection", "cpu")[0]
    t = torch.randn(shape).to(dtype)
    if t.dim() == 4:
        t = t.transpose(1, 2).contiguous().transpose(1, 2)
    tokens = t.float() if t.dim() == 3 else t.float().transpose(1, 2).flatten(2)
    u = torch.randn(tokens.shape[-1])
    with running(kernel):
        assert not module.why_not(t, u)
        product, length = module.run(t, u, length=True)
        again, none = module.run(t, u, length=False)
    assert none is None and torch.equal(product, again)
    assert_as_good_as_torch(product, tokens.double() @ u.double(), tokens @ u, factor(kernel))
    norm = torch.linalg.vector_norm
    assert_as_good_as_torch(length, norm(tokens.double(), dim=-1), norm(tokens, dim=-1), factor(kernel))


class Own(torch.Tensor):
    """A tensor whose memory a kernel must not read."""


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["plain", "by head", "strided", "a subclass", "a parameter"])
def test_projection_of_any_tensor(kind, dtype):
    t = torch.randn(2, 5, 24).to(dtype)
    given = {
        "plain": lambda: t,
        "by head": lambda: t.unflatten(2, (4, 6)).transpose(1, 2),
        "strided": lambda: torch.stack([t, t], -1)[..., 0],
        "a subclass": lambda: t.as_subclass(Own),
        "a parameter": lambda: torch.nn.Parameter(t),
    }[kind]()
    directions, weight = Directions(), torch.rand(24)
    product, length = directions.project(given, length=True, weight=weight)
    u = directions[24, torch.float64, t.device] * weight.double()
    torch.testing.assert_close(product.double(), t.double() @ u, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(length.double(), t.double().norm(dim=-1), rtol=1e-5, atol=0)
    assert directions.eps == torch.finfo(dtype).eps and not product.requires_grad
    assert product.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

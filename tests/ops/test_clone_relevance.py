import pytest
import torch
from pair_cases import KERNELS, running

from pyglobenc.ops import clone_relevance


def awkward(*shape):
    """Numbers with zeros of both signs, the guard's opposite, tiny and large ones."""
    t = torch.randn(shape) * torch.logspace(-12, 3, max(1, torch.Size(shape).numel())).view(shape)
    special = torch.tensor([0.0, -0.0, -1e-9, 1e-9, 1e-38])
    flat = t.view(-1)
    flat[:: max(1, flat.numel() // 5)][:5] = special[: flat[:: max(1, flat.numel() // 5)][:5].numel()]
    return t


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_reference_is_the_rule(parts):
    x, r = awkward(2, 3, 5).double(), [torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(parts)]
    out = clone_relevance(r, x, backend="reference")
    for index in torch.cartesian_prod(*(torch.arange(size) for size in x.shape)).tolist():
        value, total = float(x[tuple(index)]), sum(float(part[tuple(index)]) for part in r)
        guarded = value + 1e-9 or 1e-9
        assert float(out[tuple(index)]) == pytest.approx(
            0.0 if value == 0 else total / guarded * value, rel=1e-12
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 17, 33), (3, 64, 700)])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_kernel_gives_the_bits_of_torch(parts, shape, kernel):
    """Every step is one rounded operation, in the reference's order."""
    x, r = awkward(*shape), [torch.randn(shape) for _ in range(parts)]
    with running(kernel) as backend:
        assert torch.equal(clone_relevance(r, x, backend=backend), clone_relevance(r, x, backend="reference"))
        turned = [part.mT.contiguous().mT for part in r]
        assert torch.equal(
            clone_relevance(turned, x.mT.contiguous().mT, backend=backend),
            clone_relevance(r, x, backend="reference"),
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape, kernel):
    with running(kernel) as backend:
        assert clone_relevance([torch.zeros(shape)], torch.zeros(shape), backend=backend).shape == shape


@pytest.mark.parametrize("kernel", KERNELS[:1])
def test_double_precision_is_the_reference(kernel):
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    assert torch.equal(clone_relevance([x], x), clone_relevance([x], x, backend="reference"))
    with running(kernel) as backend, pytest.raises(ValueError, match="computes in float32"):
        clone_relevance([x], x, backend=backend)

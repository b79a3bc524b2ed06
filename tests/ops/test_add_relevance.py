import pytest
import torch
from numerics import assert_as_good_as_torch
from pair_cases import KERNELS, factor, running

from pyglobenc.ops import add_relevance


def inputs(*shape):
    """Relevance and branches that cancel here and there, with zeros."""
    r, a = torch.randn(shape), torch.randn(shape)
    b = torch.where(torch.rand(shape) < 0.1, -a, torch.randn(shape))
    return r, a.masked_fill(torch.rand(shape) < 0.05, 0), b


@pytest.mark.parametrize("rescale", [True, False])
def test_reference_is_the_rule(rescale):
    r, a, b = (t.double() for t in inputs(2, 3, 5))
    outs = add_relevance(r, a, b, rescale=rescale, backend="reference")
    for example in range(2):
        s = torch.where(a + b == 0, 0, r / (a + b + 1e-9))[example]
        branches = [a[example] * s, b[example] * s]
        if rescale:
            sums = [branch.sum() for branch in branches]
            shares = [abs(own) / (abs(sums[0]) + abs(sums[1]) + 1e-9) for own in sums]
            branches = [
                t * share * r[example].sum() / (own + 1e-9)
                for t, share, own in zip(branches, shares, sums, strict=True)
            ]
        for out, expected in zip(outs, branches, strict=True):
            torch.testing.assert_close(out[example], expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(1000, 1, 1), (70, 3, 5), (2, 17, 33), (3, 64, 700)])
@pytest.mark.parametrize("options", [{}, {"rescale": False}, {"stabilizer": 1e-3}], ids=str)
def test_kernel_is_as_good_as_torch(options, shape, kernel):
    given = inputs(*shape)
    exact = add_relevance(*(t.double() for t in given), **options, backend="reference")
    torch_out = add_relevance(*given, **options, backend="reference")
    with running(kernel) as backend:
        out = add_relevance(*given, **options, backend=backend)
        turned = add_relevance(*(t.mT.contiguous().mT for t in given), **options, backend=backend)
    for values in zip(out, exact, torch_out, strict=True):
        assert_as_good_as_torch(*values, factor(kernel))
    assert all(torch.equal(*pair) for pair in zip(out, turned, strict=True))
    if options.get("rescale") is False:
        # every step is one rounded operation
        assert all(torch.equal(*pair) for pair in zip(out, torch_out, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_examples_and_threads_do_not_touch_each_other(kernel):
    given = inputs(3, 70, 900)
    before = torch.get_num_threads()
    with running(kernel) as backend:
        out = add_relevance(*given, backend=backend)
        alone = [add_relevance(*(t[b : b + 1] for t in given), backend=backend) for b in range(3)]
        try:
            torch.set_num_threads(1)
            serial = add_relevance(*given, backend=backend)
        finally:
            torch.set_num_threads(before)
    for branch in range(2):
        assert torch.equal(out[branch], torch.cat([single[branch] for single in alone]))
        assert torch.equal(out[branch], serial[branch])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape, kernel):
    t = torch.zeros(shape)
    with running(kernel) as backend:
        assert all(out.shape == shape for out in add_relevance(t, t, t, backend=backend))

"""`head_gram`, `head_norms`, `mapped_square`, `proximity` of the GPU backends against the reference: on the
GPU where there is one, else interpreted.

The CUDA backend takes these tests over in cuda/test_values.py.
"""

from functools import partial
from itertools import product

import pytest
import torch
from numerics import pooled
from pair_cases import spread
from sweeps import sweep
from test_kernels_pairs import factor

from pyglobenc.ops import gram_weights, head_gram, head_norms, mapped_square, proximity

HALF = (torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# B, H, Hkv, n, dh, d
SHAPES = [
    (3, 2, 1, 1, 8, 24), (2, 4, 4, 50, 16, 64), (2, 6, 2, 40, 20, 70), (1, 3, 3, 35, 100, 33),
    (1, 2, 1, 19, 256, 40),
]  # fmt: skip


@pytest.fixture
def backend():
    return "triton"


def inputs(B, H, Hkv, n, dh, d):
    """v, weight, x and the matrices that `head_gram` takes, rounded to float32."""
    v, x = torch.randn(B, n, Hkv, dh).transpose(1, 2), torch.randn(B, n, d)
    weight = torch.randn(H, dh, d) / d**0.5
    kernel, cross_kernel = gram_weights(
        weight.double(), [torch.rand(d, dtype=torch.float64) + 0.5] if d > 1 else []
    )
    return [t.float().to(DEVICE) for t in (v, weight, x, kernel, cross_kernel)]


def check(backend, op, args, compare):
    """The error rule for every result of an op, and the results; compare: of `pooled`."""
    outs, exact, torch_outs = (
        op(*args, backend=backend),
        op(*(t.double() for t in args), backend="reference"),
        op(*(t.float() for t in args), backend="reference"),
    )
    for results in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (outs, exact, torch_outs)),
                       strict=True):  # fmt: skip
        if results[0] is not None:
            compare(*results)
    return outs


def gram_inputs(shape, dtype):
    v, _, x, kernel, cross_kernel = inputs(*shape)
    return v.to(dtype), kernel, x.to(dtype), cross_kernel


# The others run in test_strided too.
@pytest.mark.parametrize("dtype", sweep([torch.float32, *HALF], [torch.float32]), ids=str)
def test_head_gram(dtype, backend):
    with pooled(factor(backend)) as compare:
        for shape in SHAPES:
            args = gram_inputs(shape, dtype)
            gram, _ = check(backend, head_gram, args, compare)
            assert torch.equal(gram, gram.mT)
            assert torch.equal(head_gram(*args[:2], backend=backend)[0], gram)


def test_head_norms(backend):
    with pooled(factor(backend)) as compare:
        for shape in SHAPES:
            check(backend, head_norms, inputs(*shape)[:2], compare)


@pytest.mark.parametrize("dtype", sweep([torch.float32, *HALF], [torch.float32, torch.bfloat16]), ids=str)
def test_heads_of_one_feature(dtype, backend):
    """Results are products of three numbers, not sums. Such a product is off by 11 times 2^-24 at worst: each
    split takes 2, low times low 4, what is cut off 2, and the last rounding 1. torch's is off by 2 at worst,
    and by 1.4 somewhere among thousands.
    """
    shape = (1, 1, 1, 1500, 1, 1)
    with pooled(2 * factor(backend)) as compare:
        check(backend, head_gram, gram_inputs(shape, dtype), compare)
        check(backend, head_norms, inputs(*shape)[:2], compare)


@pytest.mark.parametrize("power", [-100, -64, 64, 100])
def test_head_norms_whose_squares_float32_does_not_hold(power, backend):
    v, weight, *_ = inputs(2, 4, 2, 9, 16, 24)
    v[0, 0, 3] = 0
    expected = head_norms(v, weight, backend=backend)
    assert not expected[0, 3, :2].any() and torch.equal(
        head_norms(v, weight * 2.0**power, backend=backend), expected * 2.0**power
    )
    assert torch.equal(head_norms(v * 2.0**power, weight, backend=backend), expected * 2.0**power)


def check_square(backend, x, gammas, compare):
    """The error rule; compare: of `pooled`."""
    exact = mapped_square(x.double(), [gamma.double() for gamma in gammas], backend="reference")
    compare(mapped_square(x, gammas, backend=backend), exact, mapped_square(x, gammas, backend="reference"))


# odd widths and, last, more than a lane keeps of a row
@pytest.mark.parametrize(
    "dtype, norms",
    sweep(
        # two norms in float32 are in test_mapped_square_of_what_lies_apart
        product((torch.float32, *HALF), range(3)),
        [(torch.float32, 0), (torch.bfloat16, 1)],
    ),
    ids=str,
)
def test_mapped_square(dtype, norms, backend):
    with pooled() as compare:
        for shape in ((3, 1, 2), (2, 300, 24), (2, 70, 35), (1, 200, 768), (1, 113, 1029)):
            x = (torch.randn(shape) + 0.5).to(DEVICE, dtype)
            gammas = [torch.rand(shape[-1], device=DEVICE) + 0.5 for _ in range(norms)]
            check_square(backend, x, gammas, compare)


def test_mapped_square_of_what_lies_apart(backend):
    with pooled() as compare:
        x, gammas = (torch.randn(2, 250, 24, 2), torch.rand(24, 2))
        check_square(backend, x.to(DEVICE)[..., 0], gammas.to(DEVICE).unbind(-1), compare)
        # rows that start in the middle of 16 bytes
        x, gamma = (torch.randn(2, 250, 25), torch.rand(25))
        check_square(backend, x.to(DEVICE)[..., 1:], [gamma.to(DEVICE)[1:]], compare)


def test_strided(backend):
    v, weight, x, kernel, cross_kernel = map(spread, inputs(2, 4, 2, 63, 16, 24))
    assert v.stride(-1) == 2
    with pooled(factor(backend)) as compare:
        check(backend, head_norms, (v, weight), compare)
        for dtype in (torch.float32, *HALF):
            check(backend, head_gram, (v.to(dtype), kernel, x.to(dtype), cross_kernel), compare)


def proximity_inputs(B, H, Hkv, n, dh, d, rows=5):
    """alpha, v, weight and y, rounded to float32."""
    v, weight = torch.randn(B, Hkv, n, dh), torch.randn(H, dh, d) / dh**0.5
    return [t.to(DEVICE) for t in (torch.rand(B, H, rows, n), v, weight, torch.randn(B, rows, d))]


@pytest.mark.parametrize(
    "shape, rows, dtype, per_head",
    [
        ((1, 6, 2, 40, 20, 70), 35, torch.float32, False),
        ((1, 3, 1, 31, 9, 33), 33, torch.bfloat16, False),
        ((2, 1, 1, 32, 8, 17), 17, torch.float16, False),
        ((4, 4, 2, 64, 8, 24), 1, torch.float32, True),
        ((1, 3, 3, 19, 8, 65), 18, torch.bfloat16, True),
    ],
    ids=str,
)
def test_proximity(shape, rows, dtype, per_head, backend):
    """A tile of rows and some more, one head, and heads that are compared alone for one row and for many."""
    with pooled(factor(backend)) as compare:
        alpha, v, weight, y = proximity_inputs(*shape, rows)
        check(backend, partial(proximity, per_head=per_head), (alpha, v.to(dtype), weight, y), compare)


def test_proximity_of_what_lies_apart(backend):
    with pooled(factor(backend)) as compare:
        args = [spread(t) for t in proximity_inputs(1, 4, 2, 37, 16, 24, 28)]
        for per_head in (False, True):
            check(backend, partial(proximity, per_head=per_head), args, compare)
    alpha, v, weight, y = proximity_inputs(2, 4, 2, 9, 16, 24)
    for shape in ((0, 4, 5, 9), (2, 4, 0, 9), (2, 4, 5, 0)):
        B, H, rows, n = shape
        out = proximity(alpha[:B, :, :rows, :n], v[:B, :, :n], weight, y[:B, :rows], backend=backend)
        assert out.shape == (B, rows, n)


def test_heads_without_features(backend):
    v, _, x, *_ = inputs(2, 4, 2, 5, 16, 24)
    kernel, cross_kernel = v.new_zeros(4, 0, 4, 0), v.new_zeros(4, 0, 24)
    gram, cross = head_gram(v[..., :0], kernel, x, cross_kernel, backend=backend)
    assert not gram.any() and not cross.any()


@pytest.mark.parametrize("B, n", [(0, 3), (2, 0)])
def test_empty(B, n, backend):
    v, weight = torch.zeros(B, 2, n, 16, device=DEVICE), torch.zeros(2, 16, 8, device=DEVICE)
    x, kernel = torch.zeros(B, n, 8, device=DEVICE), torch.zeros(2, 16, 2, 16, device=DEVICE)
    gram, cross = head_gram(v, kernel, x, weight, backend=backend)
    assert mapped_square(x, [x.new_ones(8)], backend=backend).shape == (B, n)
    assert gram.shape == (B, n, 2, 2) and cross.shape == head_norms(v, weight, backend=backend).shape == (
        B,
        n,
        2,
    )


def test_refuses_with_reasons(backend):
    v, weight, x, kernel, _ = inputs(1, 2, 2, 3, 16, 8)
    with pytest.raises(ValueError, match="computes in float32, got v torch.float64, weight torch.float64"):
        head_norms(v.double(), weight.double(), backend=backend)
    with pytest.raises(ValueError, match="computes in float32, got kernel torch.bfloat16"):
        head_gram(v.bfloat16(), kernel.bfloat16(), backend=backend)
    alpha, y = torch.rand(1, 2, 4, 3, device=DEVICE), torch.rand(1, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="computes in float32, got v torch.float64"):
        proximity(alpha.double(), v.double(), weight.double(), y.double(), backend=backend)
    with pytest.raises(ValueError, match="computes in float32, got x torch.float64"):
        mapped_square(x.double(), [], backend=backend)

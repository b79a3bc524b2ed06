"""`head_gram`, `head_norms`, `mapped_square` of the GPU backends against the reference: on the GPU where
there is one, else interpreted.

The CUDA backend takes these tests over in cuda/test_values.py.
"""

import pytest
import torch
from numerics import until_enough
from test_kernels_pairs import factor

from pyglobenc.ops import gram_weights, head_gram, head_norms, mapped_square

HALF = (torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# B, H, Hkv, n, dh, d
SHAPES = [
    (4, 1, 1, 750, 1, 1), (20, 2, 1, 1, 8, 24), (2, 4, 4, 33, 16, 64),
    (2, 6, 2, 40, 20, 70), (1, 3, 3, 70, 100, 33), (1, 2, 1, 60, 256, 40),
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


def check(backend, op, draw):
    """The error rule for every result of an op; draw() returns its arguments. The last arguments and
    results.
    """
    # of numbers alone, not sums: a product of three is 11 times 2^-24 off at worst (splits 2 each, low times
    # low 4, what is cut off 2, the last rounding 1), torch's 2 at worst and 1.4 somewhere among thousands
    for compare in until_enough(factor(backend)):
        args = draw()
        doubled, single = [t.double() for t in args], [t.float() for t in args]
        results = [
            op(*args, backend=backend),
            op(*doubled, backend="reference"),
            op(*single, backend="reference"),
        ]
        for out, exact, torch_out in zip(
            *((t,) if isinstance(t, torch.Tensor) else t for t in results), strict=True
        ):
            if out is not None:
                compare(out, exact, torch_out, factor(backend) * (2 if args[0].shape[-1] == 1 else 1))
    return args, results[0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_gram(shape, dtype, backend):
    def draw():
        v, _, x, kernel, cross_kernel = inputs(*shape)
        return v.to(dtype), kernel, x.to(dtype), cross_kernel

    args, (gram, _) = check(backend, head_gram, draw)
    assert torch.equal(gram, gram.mT)
    assert torch.equal(head_gram(*args[:2], backend=backend)[0], gram)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_norms(shape, backend):
    check(backend, head_norms, lambda: inputs(*shape)[:2])


@pytest.mark.parametrize("power", [-100, -64, 64, 100])
def test_head_norms_whose_squares_float32_does_not_hold(power, backend):
    v, weight, *_ = inputs(2, 4, 2, 9, 16, 24)
    v[0, 0, 3] = 0
    expected = head_norms(v, weight, backend=backend)
    assert not expected[0, 3, :2].any() and torch.equal(
        head_norms(v, weight * 2.0**power, backend=backend), expected * 2.0**power
    )
    assert torch.equal(head_norms(v * 2.0**power, weight, backend=backend), expected * 2.0**power)


def check_square(backend, draw):
    """The error rule; draw() returns x and the gammas."""
    for compare in until_enough():
        x, gammas = draw()
        exact = mapped_square(x.double(), [gamma.double() for gamma in gammas], backend="reference")
        compare(
            mapped_square(x, gammas, backend=backend), exact, mapped_square(x, gammas, backend="reference")
        )


# odd widths and, last, more than a lane keeps of a row
@pytest.mark.parametrize(
    "shape", [(1000, 1, 2), (16, 33, 24), (15, 70, 35), (3, 350, 768), (9, 113, 1029)], ids=str
)
@pytest.mark.parametrize("norms", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_mapped_square(dtype, norms, shape, backend):
    def draw():
        x = (torch.randn(shape) + 0.5).to(DEVICE, dtype)
        return x, [torch.rand(shape[-1], device=DEVICE) + 0.5 for _ in range(norms)]

    check_square(backend, draw)


def test_mapped_square_of_what_lies_apart(backend):
    gammas = torch.rand(24, 2, device=DEVICE).unbind(-1)
    check_square(backend, lambda: (torch.randn(2, 500, 24, 2, device=DEVICE)[..., 0], gammas))
    # rows that start in the middle of 16 bytes
    gammas = [torch.rand(25, device=DEVICE)[1:]]
    check_square(backend, lambda: (torch.randn(2, 500, 25, device=DEVICE)[..., 1:], gammas))


def test_strided(backend):
    def draw(op, dtype):
        v, weight, x, kernel, cross_kernel = (
            torch.stack([t, t], -1)[..., 0] for t in inputs(2, 4, 2, 126, 16, 24)
        )
        assert v.stride(-1) == 2
        return (v, weight) if op is head_norms else (v.to(dtype), kernel, x.to(dtype), cross_kernel)

    for op, dtype in ((head_norms, torch.float32), *((head_gram, dtype) for dtype in (torch.float32, *HALF))):
        check(backend, op, lambda op=op, dtype=dtype: draw(op, dtype))


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
    with pytest.raises(ValueError, match="computes in float32, got x torch.float64"):
        mapped_square(x.double(), [], backend=backend)

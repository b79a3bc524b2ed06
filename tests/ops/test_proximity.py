import pytest
import torch
from numerics import until_enough
from pair_cases import KERNELS, assert_threads_change_nothing, factor, running, spread

from pyglobenc.ops import proximity

HALF = (torch.bfloat16, torch.float16)
# B, H, Hkv, T, n, dh, d: one number, odd sizes, groups, a register tile of rows and one more, features that
# fill vectors and those that don't, several blocks of keys
CASES = [
    (1000, 1, 1, 1, 1, 1, 1),
    (3, 5, 1, 7, 13, 7, 35),
    (2, 4, 2, 6, 33, 8, 64),
    (1, 3, 3, 61, 40, 16, 130),
    (2, 2, 1, 5, 97, 9, 17),
    (1, 12, 12, 13, 14, 64, 768),
]


def arguments(B, H, Hkv, T, n, dh, d):
    """alpha, v, W_O and y in float64; vectors lie near y, beyond it and behind it."""
    make = dict(dtype=torch.float64)
    alpha = torch.rand(B, H, T, n, **make) * torch.randint(0, 4, (B, H, T, n))
    v, weight = torch.randn(B, Hkv, n, dh, **make), torch.randn(H, dh, d, **make) / dh**0.5
    y = torch.randn(B, T, d, **make) + alpha[..., :1].permute(0, 2, 3, 1).sum(-1) * (v[:, :1, 0] @ weight[0])
    return alpha, v, weight, y


def rounded(args, dtype):
    """The same in float32, v rounded to dtype."""
    alpha, v, weight, y = args
    return alpha.float(), v.to(dtype), weight.float(), y.float()


def direct(alpha, v, weight, y, per_head):
    """The definition, with the vector of every head, row and key."""
    f = torch.einsum("bhjc,hcd->bhjd", v.repeat_interleave(weight.shape[0] // v.shape[1], 1), weight)
    vectors = torch.einsum("bhtj,bhjd->bhtjd", alpha, f)
    vectors, y = (vectors, y[:, None]) if per_head else (vectors.sum(1), y)
    return (y.abs().sum(-1)[..., None] - (y[..., None, :] - vectors).abs().sum(-1)).clamp(min=0)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case, per_head):
    args = arguments(*case)
    out = proximity(*args, per_head=per_head, backend="reference")
    exact = direct(*args, per_head)
    assert (out - exact).abs().max() <= 1e-12 * args[3].abs().sum(-1).max()
    assert out.shape == exact.shape


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_as_good_as_torch(case, kernel, per_head, dtype):
    if dtype in HALF and case != CASES[2]:
        return
    for compare in until_enough(factor(kernel)):
        args = rounded(arguments(*case), dtype)
        with running(kernel) as backend:
            out = proximity(*args, per_head=per_head, backend=backend)
        exact = proximity(*(t.double() for t in args), per_head=per_head, backend="reference")
        compare(out, exact, proximity(*args, per_head=per_head, backend="reference"))
        assert out.dtype == torch.float32 and (out > 0).any()


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_a_small_vector_keeps_its_digits(kernel):
    """Vectors of a millionth of y; the difference of two norms of y would keep one digit of them."""
    alpha, v, weight, y = rounded(arguments(1, 2, 2, 40, 40, 8, 64), torch.float32)
    alpha = alpha * 1e-6
    exact = proximity(*(t.double() for t in (alpha, v, weight, y)), backend="reference")
    with running(kernel) as backend:
        out = proximity(alpha, v, weight, y, backend=backend)
    # Each of the 2 * 8 products and 64 features rounds at most twice, relative to the largest vector.
    assert (out - exact).abs().max() <= 2 * 80 * 2**-24 * 64 * exact.max()
    assert (out > 0).float().mean() > 0.2


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
@pytest.mark.parametrize("per_head", [False, True])
def test_strided_inputs(kernel, per_head):
    args = rounded(arguments(2, 4, 2, 7, 37, 8, 90), torch.float32)
    alpha, v, weight, y = args
    layouts = [
        tuple(map(spread, args)),
        (
            alpha.transpose(1, 2).contiguous().transpose(1, 2),
            v.mT.contiguous().mT,
            weight,
            y[:, :1].expand_as(y),
        ),
    ]
    with running(kernel) as backend:
        for layout in layouts:
            out = proximity(*layout, per_head=per_head, backend=backend)
            expected = proximity(*(t.contiguous() for t in layout), per_head=per_head, backend=backend)
            torch.testing.assert_close(out, expected, rtol=0, atol=0 if layout is layouts[0] else 1e-4)


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_keys_and_rows_stand_alone(kernel):
    """NaN in one key's value or one row's y stays there; a key without weight has no proximity."""
    alpha, v, weight, y = rounded(arguments(2, 4, 4, 9, 21, 8, 24), torch.float32)
    v[0, :, 3], y[1, 4], alpha[:, :, :, 7] = torch.nan, torch.nan, 0
    with running(kernel) as backend:
        out = proximity(alpha, v, weight, y, backend=backend)
    bad = torch.zeros(2, 9, 21, dtype=torch.bool)
    bad[0, :, 3], bad[1, 4] = True, True
    bad[:, :, 7] = False
    assert torch.equal(out.isnan(), bad)
    assert (out[:, :, 7] == 0).all()


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 5, 8, 6), (2, 4, 2, 0, 5, 8, 6), (2, 4, 2, 3, 0, 8, 6)])
def test_empty(shape, kernel):
    B, H, _, T, n, *_ = shape
    args = rounded(arguments(*shape[:4], max(n, 1), *shape[5:]), torch.float32)
    args = (args[0][..., :n], args[1][:, :, :n], *args[2:])
    with running(kernel) as backend:
        assert proximity(*args, backend=backend).shape == (B, T, n)
        assert proximity(*args, per_head=True, backend=backend).shape == (B, H, T, n)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("per_head", [False, True])
def test_threads_do_not_change_the_result(kernel, per_head):
    args = rounded(arguments(2, 4, 2, 70, 50, 8, 200), torch.float32)
    assert_threads_change_nothing(
        kernel, lambda backend: proximity(*args, per_head=per_head, backend=backend)
    )


def test_arguments_are_checked():
    alpha, v, weight, y = arguments(2, 4, 2, 3, 5, 8, 6)
    for wrong, message in (
        ((alpha[0], v, weight, y), r"alpha must be \(B, H, T, n\)"),
        ((alpha, v[..., 1:, :], weight, y), "v must be .* with .*n=5"),
        ((alpha, v, weight[:3], y), "weight must be"),
        ((alpha, v, weight, y[..., 1:]), "y must be"),
        ((alpha[:, :3], v, weight[:3], y), "multiple of that of key-value heads"),
    ):
        with pytest.raises(ValueError, match=message):
            proximity(*wrong)
    with pytest.raises(TypeError, match="one dtype"):
        proximity(alpha.float(), v, weight, y)
    with pytest.raises(TypeError, match="one dtype"):
        proximity(alpha, v.half(), weight, y)
    with pytest.raises(ValueError, match="computes in float32"):
        proximity(alpha, v, weight, y, backend="cpu")


@pytest.mark.parametrize("per_head", [False, True])
def test_opcheck(per_head):
    args = rounded(arguments(1, 4, 2, 3, 5, 8, 6), torch.float32)
    torch.library.opcheck(torch.ops.pyglobenc.proximity.default, (*args, per_head, "auto"))

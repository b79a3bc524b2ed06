import pytest
import torch
from direct import stage_matrix
from numerics import until_enough
from pair_cases import KERNELS, Case, assert_threads_change_nothing, factor, layer, running, spread

from pyglobenc.ops import gram_weights, head_gram

HALF = (torch.bfloat16, torch.float16)
CASES = [
    Case(B=1000, n=1, H=1, Hkv=1, dh=1, d=3, norms=0),
    Case(B=18, n=13, H=5, Hkv=1, dh=7, d=35),
    Case(n=64, H=3, Hkv=3, dh=6, d=18, norms=1),
    Case(n=65, H=6, Hkv=2, dh=17, d=102),
    Case(B=1, n=300, H=2, Hkv=2, dh=33, d=70),
    Case(B=1, n=130, H=12, Hkv=12, dh=64, d=768),
]


def arguments(case):
    """v, K, x and P of a random layer, in float64."""
    t = layer(case)
    kernel, cross_kernel = gram_weights(t["weight"], t["gammas"])
    return t, (t["v"], kernel, t["x"], cross_kernel)


def rounded(args, dtype):
    """v, K, x and P in float32, v and x rounded to dtype."""
    return tuple(a.to(given) for a, given in zip(args, (dtype, torch.float32) * 2, strict=True))


def check(kernel, case, dtype=torch.float32):
    """The error rule for v and x in a dtype, and that G is symmetric and the same without x."""
    for compare in until_enough(factor(kernel)):
        args = rounded(arguments(case)[1], dtype)
        with running(kernel) as backend:
            gram, cross = head_gram(*args, backend=backend)
            alone, nothing = head_gram(*args[:2], backend=backend)
        exact = head_gram(*(a.double() for a in args), backend="reference")
        torch_out = head_gram(*(a.float() for a in args), backend="reference")
        for values in zip((gram, cross), exact, torch_out, strict=True):
            compare(*values)
        assert gram.dtype == cross.dtype == torch.float32
        assert torch.equal(alone, gram) and nothing is None and torch.equal(gram, gram.mT)


@pytest.mark.parametrize(
    "case", [Case(n=5, norms=0), Case(n=6, norms=1, H=6, Hkv=2), Case(n=7, norms=2)], ids=str
)
def test_reference_is_the_definition(case):
    t, args = arguments(case)
    v = t["v"].repeat_interleave(case.H // case.Hkv, dim=1)
    stage = stage_matrix(case.d, t["gammas"])
    mapped = torch.einsum("bhjc,hcd->bjhd", v, t["weight"]) @ stage
    gram, cross = head_gram(*args, backend="reference")
    torch.testing.assert_close(gram, mapped @ mapped.mT)
    torch.testing.assert_close(cross, (mapped * (t["x"] @ stage)[:, :, None]).sum(-1))
    alone, nothing = head_gram(*args[:2], backend="reference")
    assert torch.equal(alone, gram) and nothing is None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_as_good_as_torch(case, kernel):
    check(kernel, case)


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_values_in_half_precision(dtype, kernel):
    check(kernel, Case(n=65, H=6, Hkv=2, dh=17, d=102), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_strided_inputs(dtype, kernel):
    args = rounded(arguments(Case(n=37))[1], dtype)
    with running(kernel) as backend:
        results = head_gram(*args, backend=backend), head_gram(*map(spread, args), backend=backend)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("B, n", [(0, 3), (2, 0)])
def test_empty(B, n, kernel):
    v, k = torch.zeros(B, 2, n, 8), torch.zeros(4, 8, 4, 8)
    with running(kernel) as backend:
        gram, cross = head_gram(v, k, torch.zeros(B, n, 5), torch.zeros(4, 8, 5), backend=backend)
    assert gram.shape == (B, n, 4, 4) and cross.shape == (B, n, 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_do_not_change_the_result(kernel):
    args = tuple(a.float() for a in arguments(Case(B=3, n=150))[1])[:2]
    assert_threads_change_nothing(kernel, lambda backend: head_gram(*args, backend=backend)[0])


def test_arguments_are_checked():
    v, kernel, x, cross_kernel = arguments(Case(n=6))[1]
    with pytest.raises(ValueError, match="head_gram: v must be"):
        head_gram(v[0], kernel)
    with pytest.raises(ValueError, match="given together"):
        head_gram(v, kernel, x)
    with pytest.raises(ValueError, match="multiple of that of key-value heads"):
        head_gram(v[:, :3], kernel)


@pytest.mark.parametrize(
    "v, kernel, x, cross_kernel",
    [
        (torch.float32, torch.float64, torch.float32, torch.float64),
        (torch.float64, torch.float32, torch.float64, torch.float32),
        (torch.bfloat16, torch.float64, torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.float16, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_other_mixtures_are_refused(v, kernel, x, cross_kernel):
    args = [
        a.to(dtype) for a, dtype in zip(arguments(Case(n=6))[1], (v, kernel, x, cross_kernel), strict=True)
    ]
    with pytest.raises(TypeError, match="one dtype"):
        head_gram(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    args = rounded(arguments(Case(n=6))[1], dtype)
    torch.library.opcheck(torch.ops.pyglobenc.head_gram.default, (*args[:2], "auto"))
    torch.library.opcheck(torch.ops.pyglobenc.head_gram_cross.default, (*args, "auto"))

import pytest
import torch
from direct import stage_matrix
from numerics import assert_as_good_as_torch, until_enough
from pair_cases import KERNELS, Case, assert_threads_change_nothing, factor, layer, running, spread
from sweeps import sweep

from pyglobenc.ops import gram_weights, head_gram, mapped_square, norm_terms

HALF = (torch.bfloat16, torch.float16)
# one number, odd sizes, groups, a block of every instruction set and one more, blocks that are split by
# features and those that aren't
CASES = [
    Case(B=1000, n=1, H=1, Hkv=1, dh=1, d=3, norms=0),
    Case(B=3, n=13, H=5, Hkv=1, dh=7, d=35),
    Case(n=16, H=3, Hkv=3, dh=6, d=18, norms=1),
    Case(B=1, n=64, H=3, Hkv=1, dh=16, d=65, norms=1),
    Case(n=65, H=6, Hkv=2, dh=17, d=102),
    Case(B=1, n=300, H=2, Hkv=2, dh=33, d=70),
    Case(B=3, n=701, H=4, Hkv=2, dh=8, d=32),
    Case(B=1, n=14, H=12, Hkv=12, dh=64, d=768),
]


def arguments(case):
    """v, W_O, x and gammas of a random layer, in float64."""
    t = layer(case)
    return t["v"], t["weight"], t["x"], t["gammas"]


def rounded(args, dtype):
    """The same in float32, v and x rounded to dtype."""
    v, weight, x, gammas = args
    return v.to(dtype), weight.float(), x.to(dtype), [gamma.float() for gamma in gammas]


def doubled(args):
    v, weight, x, gammas = args
    return v.double(), weight.double(), x.double(), [gamma.double() for gamma in gammas]


def check(kernel, case, dtype, change=lambda weight: weight):
    """The error rule for v and x in a dtype, and that G is symmetric and the same without x."""
    for compare in until_enough(factor(kernel)):
        v, weight, x, gammas = rounded(arguments(case), dtype)
        weight = change(weight)
        args = v, weight, x, gammas
        with running(kernel) as backend:
            out = norm_terms(*args, backend=backend)
            alone = norm_terms(v, weight, None, gammas, backend=backend)
        exact = norm_terms(*doubled(args), backend="reference")
        torch_out = norm_terms(*rounded(args, torch.float32), backend="reference")
        for values in zip(out, exact, torch_out, strict=True):
            compare(*values)
        assert all(t.dtype == torch.float32 for t in out)
        assert torch.equal(alone[0], out[0]) and alone[1:] == (None, None)
        # torch's products need not be symmetric
        assert kernel == "reference" or torch.equal(out[0], out[0].mT)


@pytest.mark.parametrize(
    "case", [Case(n=5, norms=0), Case(n=6, norms=1, H=6, Hkv=2), Case(n=7, norms=2)], ids=str
)
def test_reference_is_the_definition(case):
    args = v, weight, x, gammas = arguments(case)
    stage = stage_matrix(case.d, gammas)
    mapped = torch.einsum("bhjc,hcd->bjhd", v.repeat_interleave(case.H // case.Hkv, dim=1), weight) @ stage
    gram, cross, square = norm_terms(*args, backend="reference")
    torch.testing.assert_close(gram, mapped @ mapped.mT)
    torch.testing.assert_close(cross, (mapped * (x @ stage)[:, :, None]).sum(-1))
    torch.testing.assert_close(square, (x @ stage).square().sum(-1))


def test_reference_in_tiles(monkeypatch):
    args = arguments(Case(n=13))
    whole = norm_terms(*args, backend="reference")
    monkeypatch.setattr("pyglobenc.backends.reference.norm_terms.MIN_TOKENS", 1)
    for tiled, expected in zip(norm_terms(*args, backend="reference"), whole, strict=True):
        torch.testing.assert_close(tiled, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_form_with_constants(case):
    v, weight, x, gammas = args = arguments(case)
    kernel, cross_kernel = gram_weights(weight, gammas)
    expected = (
        *head_gram(v, kernel, x, cross_kernel, backend="reference"),
        mapped_square(x, gammas, backend="reference"),
    )
    for out, other in zip(norm_terms(*args, backend="reference"), expected, strict=True):
        torch.testing.assert_close(out, other)


# The last case has the sizes of BERT-base.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", sweep(CASES, CASES[:-1]), ids=str)
def test_kernel_is_as_good_as_torch(case, kernel):
    check(kernel, case, torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rank", [1, 3])
def test_vectors_that_cancel(rank, kernel):
    """Heads whose vectors lie in a few dimensions and nearly add up to nothing: squares a^T G a near 0 beside
    their terms.
    """
    case = Case(B=1, n=1100, H=6, Hkv=6, dh=8, d=48)
    v, weight, x, gammas = arguments(case)
    weight = (
        torch.randn(1, case.dh, rank, dtype=weight.dtype) @ torch.randn(1, rank, case.d, dtype=weight.dtype)
        + 1e-4 * weight
    )
    v = torch.cat([v[:, :-1], -v[:, :-1].sum(1, keepdim=True)], 1)
    args = rounded((v, weight, x, gammas), torch.float32)

    def square(terms):
        return terms[0].sum((2, 3)), terms[0].sum((2, 3)) + 2 * terms[1].sum(2) + terms[2]

    with running(kernel) as backend:
        out = square(norm_terms(*args, backend=backend))
    exact, torch_out = (
        square(norm_terms(*doubled(args), backend="reference")),
        square(norm_terms(*args, backend="reference")),
    )
    for values in zip(out, exact, torch_out, strict=True):
        assert_as_good_as_torch(*values, factor(kernel))


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_values_in_half_precision(dtype, kernel):
    check(kernel, Case(n=65, H=6, Hkv=2, dh=17, d=102), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mean", [0, 0.5, 50])
@pytest.mark.parametrize("norms", [0, 1, 2])
def test_weights_of_half_precision(norms, mean, dtype, kernel):
    """Numbers that are exact in a few bits, also where LayerNorm subtracts most of what they add up to."""
    case = Case(B=1, n=70, H=4, Hkv=2, dh=17, d=70, norms=norms)
    check(kernel, case, dtype, lambda weight: (weight + mean * weight.std()).to(dtype).float())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_strided_inputs(dtype, kernel):
    v, weight, x, gammas = rounded(arguments(Case(n=37)), dtype)
    spread_v, spread_weight, spread_x, *spread_gammas = map(spread, (v, weight, x, *gammas))
    # as a Linear layer keeps it, as a Conv1D does, and neither
    layouts = [weight.flatten(0, 1).T.contiguous().T.unflatten(0, weight.shape[:2]), weight, spread_weight]
    with running(kernel) as backend:
        expected = norm_terms(v, weight, x, gammas, backend=backend)
        for layout in layouts:
            out = norm_terms(spread_v, layout, spread_x, spread_gammas, backend=backend)
            assert all(torch.equal(*pair) for pair in zip(out, expected, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("B, n, dh", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty(B, n, dh, kernel):
    with running(kernel) as backend:
        gram, cross, square = norm_terms(
            torch.zeros(B, 2, n, dh),
            torch.zeros(4, dh, 5),
            torch.zeros(B, n, 5),
            [torch.ones(5)] * 2,
            backend=backend,
        )
    assert gram.shape == (B, n, 4, 4) and cross.shape == (B, n, 4) and square.shape == (B, n)
    assert not gram.any() and not cross.any() and not square.any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [14, 150, 700])
def test_threads_do_not_change_the_result(n, kernel):
    args = rounded(arguments(Case(B=3, n=n)), torch.float32)
    assert_threads_change_nothing(kernel, lambda backend: norm_terms(*args, backend=backend))


def test_arguments_are_checked():
    v, weight, x, gammas = arguments(Case(n=6))
    with pytest.raises(ValueError, match="norm_terms: v must be"):
        norm_terms(v[0], weight)
    with pytest.raises(ValueError, match=r"norm_terms: gammas\[1\] must be \(d\)"):
        norm_terms(v, weight, x, [gammas[0], gammas[1][1:]])
    with pytest.raises(ValueError, match="at most 2 entries, got 3"):
        norm_terms(v, weight, x, [*gammas, gammas[0]])
    with pytest.raises(ValueError, match="multiple of that of key-value heads"):
        norm_terms(v[:, :3], weight)
    for v_type, weight_type, x_type, gamma_type in [
        (torch.float32, torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float16, torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32, torch.float64),
    ]:
        with pytest.raises(TypeError, match="one dtype"):
            norm_terms(
                v.to(v_type), weight.to(weight_type), x.to(x_type), [gamma.to(gamma_type) for gamma in gammas]
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    v, weight, x, gammas = rounded(arguments(Case(n=6)), dtype)
    torch.library.opcheck(torch.ops.pyglobenc.norm_terms.default, (v, weight, gammas, "auto"))
    torch.library.opcheck(torch.ops.pyglobenc.norm_terms_residual.default, (v, weight, x, gammas, "auto"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALF)
def test_every_number_in_half_precision(kernel, dtype):
    v = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None, None, :, None]
    one = torch.ones(1, 1, 1)
    with running(kernel) as backend:
        _, cross, _ = norm_terms(v, one, torch.ones(1, 2**16, 1, dtype=dtype), backend=backend)
    found, v = cross.flatten(), v.flatten().float()
    # Tiles take numbers that are subnormal in float32 for 0, and some products of infinity are NaN.
    finite, tiny = v.isfinite(), v.abs() < torch.finfo(torch.float32).tiny
    assert torch.equal(found[finite & ~tiny], v[finite & ~tiny])
    assert ((found[tiny] == v[tiny]) | (found[tiny] == 0)).all()
    assert not found[~finite].isfinite().any()

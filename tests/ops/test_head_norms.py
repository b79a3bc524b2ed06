import pytest
import torch
from numerics import assert_as_good_as_torch, until_enough
from pair_cases import KERNELS, Case, factor, layer, running, spread

from pyglobenc.ops import head_norms

CASES = [Case(B=1000, n=1, H=1, Hkv=1, dh=1), Case(B=40, n=7), Case(B=20, n=13, H=6, Hkv=2, dh=5), Case(B=0)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case):
    t = layer(case)
    v = t["v"].repeat_interleave(case.H // case.Hkv, dim=1)
    exact = torch.einsum("bhjc,hcd->bjhd", v, t["weight"]).norm(dim=-1)
    out = head_norms(t["v"], t["weight"], backend="reference")
    torch.testing.assert_close(out, exact)
    single = head_norms(t["v"].float(), t["weight"].float())
    assert single.dtype == torch.float32
    rounded = torch.einsum("bhjc,hcd->bjhd", v.float().double(), t["weight"].float().double()).norm(dim=-1)
    assert_as_good_as_torch(
        single, rounded, torch.einsum("bhjc,hcd->bjhd", v.float(), t["weight"].float()).norm(dim=-1)
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case", [*CASES, Case(n=65, H=3, Hkv=1, dh=33), Case(B=1, n=130, H=12, Hkv=12, dh=64, d=768)], ids=str
)
def test_kernel_is_as_good_as_torch(case, kernel):
    for compare in until_enough(factor(kernel)):
        t = layer(case)
        args = t["v"].float(), t["weight"].float()
        with running(kernel) as backend:
            out = head_norms(*args, backend=backend)
            strided = head_norms(*map(spread, args), backend=backend)
        exact, torch_out = (
            head_norms(*(a.double() for a in args), backend="reference"),
            head_norms(*args, backend="reference"),
        )
        compare(out, exact, torch_out)
        compare(out.square(), exact.square(), torch_out.square())
        # torch's product of the weights may be summed in another order
        compare(strided, exact, torch_out)


def small_vectors(v, weight, part):
    """v (B, Hkv, n, dh) such that v W_O is smaller than v and W_O let expect: only its components of small
    singular values are kept.
    """
    basis = torch.linalg.svd(weight.double(), full_matrices=False)[0][:, :, -part:]
    return (v.double() @ basis @ basis.mT).float()


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
@pytest.mark.parametrize("power", [-100, -64, -40, 40, 64, 100])
@pytest.mark.parametrize("of", ["v", "weight", "both"])
def test_scale_is_nothing(of, power, kernel):
    """Norms of vectors scaled by a power of two, whose squares may lie outside float32's range."""
    for compare in until_enough(factor(kernel)):
        t = layer(Case(n=60))
        v, weight = t["v"].float(), t["weight"].float()
        v[0, 0, 3] = 0
        exact, torch_out = (
            head_norms(v.double(), weight.double(), backend="reference"),
            head_norms(v, weight, backend="reference"),
        )
        scales = {"v": (power, 0), "weight": (0, power), "both": (power, -power)}[of]
        with running(kernel) as backend:
            out = head_norms(*(s * 2.0**p for s, p in zip((v, weight), scales, strict=True)), backend=backend)
        assert not out[0, 3, 0] and out[0, 3, 1:].all()
        compare((out.double() * 2.0 ** -sum(scales)).float(), exact, torch_out)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_vectors_near_the_null_space(scale, kernel):
    for compare in until_enough(factor(kernel)):
        weight = layer(Case(H=3, Hkv=3, dh=16, d=64))["weight"]
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        weight = ((left * torch.logspace(0, -4, 16)) @ right).float()
        v = small_vectors(torch.randn(2, 3, 100, 16), weight, 3) * scale
        exact = head_norms(v.double(), weight.double(), backend="reference")
        with running(kernel) as backend:
            out = head_norms(v, weight, backend=backend)
        # every norm relative to itself
        compare(
            *(
                norms / exact
                for norms in (out.double(), exact, head_norms(v, weight, backend="reference").double())
            )
        )


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_what_is_not_finite_stays_where_it_is(kernel):
    t = layer(Case(n=9))
    v, weight = t["v"].float(), t["weight"].float()
    v[0, 1, 3, 2], v[1, 2, 5, 0] = torch.nan, torch.inf
    with running(kernel) as backend:
        out = head_norms(v, weight, backend=backend)
    wrong = ~out.isfinite()
    assert wrong[0, 3, 1] and wrong[1, 5, 2] and wrong.sum() == 2


def test_arguments_are_checked():
    t = layer(Case(n=6, H=4, Hkv=2))
    with pytest.raises(ValueError, match="head_norms: v must be"):
        head_norms(t["v"][0], t["weight"])
    with pytest.raises(ValueError, match="multiple of that of key-value heads"):
        head_norms(t["v"], t["weight"][:3])
    with pytest.raises(TypeError, match="one dtype"):
        head_norms(t["v"].float(), t["weight"])


def test_opcheck():
    t = layer(Case(n=6))
    torch.library.opcheck(torch.ops.pyglobenc.head_norms.default, (t["v"], t["weight"], "auto"))

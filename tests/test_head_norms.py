import pytest
import torch
from numerics import assert_as_good_as_torch
from pair_cases import KERNELS, Case, factor, layer, running

from pyglobenc.ops import head_norms

CASES = [Case(n=1, H=1, Hkv=1, dh=1), Case(n=7), Case(n=13, H=6, Hkv=2, dh=5), Case(B=0)]


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
    assert_as_good_as_torch(single, rounded, torch.einsum("bhjc,hcd->bjhd", v.float(), t["weight"].float()).norm(dim=-1))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [*CASES, Case(n=65, H=3, Hkv=1, dh=33), Case(B=1, n=130, H=12, Hkv=12, dh=64, d=768)], ids=str)
def test_kernel_is_as_good_as_torch(case, kernel):
    t = layer(case)
    args = t["v"].float(), t["weight"].float()
    with running(kernel) as backend:
        out = head_norms(*args, backend=backend)
        strided = head_norms(*(torch.stack([a, a], -1)[..., 0] for a in args), backend=backend)
    exact, torch_out = head_norms(*(a.double() for a in args), backend="reference"), head_norms(*args, backend="reference")
    assert_as_good_as_torch(out, exact, torch_out, factor(kernel))
    assert_as_good_as_torch(out.square(), exact.square(), torch_out.square(), factor(kernel))
    # torch's product of the weights may be summed in another order
    assert_as_good_as_torch(strided, exact, torch_out, factor(kernel))


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

import pytest
import torch
from direct import attention_probabilities
from numerics import assert_as_good_as_torch
from pair_cases import Case, layer

from pyglobenc.backends.reference.stage_map import stage_map
from pyglobenc.ops import attention, mixing_ratio

CASES = [
    Case(n=1),
    Case(n=7, residual=False, norms=0),
    Case(n=13, residual=True, norms=0),
    Case(n=12, H=6, Hkv=2, dh=5, norms=1),
    Case(n=11, mask="right"),
    Case(n=11, window=(-1, 0)),
    Case(B=0),
]


def arguments(case, t, dtype):
    q, k, v, x, weight = (t[name].to(dtype) for name in ("q", "k", "v", "x", "weight"))
    gammas = [gamma.to(dtype) for gamma in t["gammas"]]
    o, lse = attention(q, k, v, key_mask=t["key_mask"], window=case.window)
    return (q, k, v, o, lse, stage_map(weight, gammas), stage_map(x, gammas) if case.residual else None)


def definition(case, t, dtype, arithmetic=torch.float64):
    """The ratio from every decomposed vector, on inputs rounded to dtype."""
    q, k, v, x, weight, *gammas = (
        one.to(dtype).to(arithmetic)
        for one in (*(t[name] for name in ("q", "k", "v", "x", "weight")), *t["gammas"])
    )
    alpha = attention_probabilities(q, k, t["key_mask"], q.shape[3] ** -0.5, case.window)
    v = v.repeat_interleave(case.H // case.Hkv, dim=1)
    vectors = torch.einsum("bhij,bhjc,hcd->bijd", alpha, v, weight)
    if case.residual:
        vectors = vectors + torch.eye(case.n, dtype=arithmetic)[:, :, None] * x[:, :, None]
    vectors = stage_map(vectors, gammas)
    own = torch.diagonal(vectors, dim1=1, dim2=2).transpose(1, 2)
    mixed, own = (vectors.sum(2) - own).norm(dim=-1), own.norm(dim=-1)
    return mixed / (mixed + own)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case):
    t = layer(case)
    out, exact = mixing_ratio(*arguments(case, t, torch.float64)), definition(case, t, torch.float64)
    # the ratio of a padded query means nothing
    real = torch.ones_like(out, dtype=torch.bool) if t["key_mask"] is None else t["key_mask"]
    torch.testing.assert_close(out[real], exact[real], rtol=1e-10, atol=1e-13)


def test_float32():
    case = Case(B=25, n=40, d=32)
    t = layer(case)
    exact = definition(case, t, torch.float32)
    assert_as_good_as_torch(
        mixing_ratio(*arguments(case, t, torch.float32)),
        exact,
        definition(case, t, torch.float32, torch.float32),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_widened(dtype):
    case = Case(B=25, n=40, d=32)
    *halves, lse, weight, x = arguments(case, layer(case), dtype)
    out = mixing_ratio(*halves, lse, weight.float(), x.float())
    wide = [t.double() for t in (*halves, lse, weight, x)]
    assert out.dtype == torch.float32
    assert_as_good_as_torch(out, mixing_ratio(*wide), mixing_ratio(*(t.float() for t in wide)))


def test_arguments_are_checked():
    case = Case(n=6)
    args = list(arguments(case, layer(case), torch.float64))
    with pytest.raises(ValueError, match=r"mixing_ratio: o must be \(B, H, n, dh\)"):
        mixing_ratio(*args[:3], args[3][:, :, :5], *args[4:])
    with pytest.raises(TypeError, match="one dtype"):
        mixing_ratio(args[0].float(), *args[1:])
    with pytest.raises(ValueError, match="mixing_ratio has no triton kernel"):
        mixing_ratio(*args, backend="triton")


def test_opcheck():
    case = Case(n=6)
    args = arguments(case, layer(case), torch.float64)
    torch.library.opcheck(torch.ops.pyglobenc.mixing_ratio.default, (*args, 0.3, "auto"))

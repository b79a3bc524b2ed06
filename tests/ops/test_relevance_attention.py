"""The relevance ops of attention: `relevance_attention`, `relevance_rollout_step`, `relevance_maps`."""

from itertools import cycle, product

import pytest
import torch
from numerics import until_enough
from pair_cases import KERNELS, Case, doubled, factor, running
from relevance_cases import exact_map, inputs
from sweeps import sweep

from pyglobenc.backends.shared.safe_division import safe_divide
from pyglobenc.ops import relevance_attention, relevance_maps, relevance_rollout_step
from pyglobenc.ops.attention import attention

# n = 197 takes several blocks of queries and tiles of keys; other head widths fill other numbers of vectors.
CASES = [
    Case(B=60, n=1),
    Case(B=40, n=13, H=5, Hkv=5, dh=3),
    Case(B=1, n=197, H=12, Hkv=12, dh=8),
    Case(B=3, n=37, mask="right"),
    Case(B=3, n=31, mask="holes"),
    Case(n=33, window=(-1, 0), mask="left"),
    Case(n=49, window=(17, 9)),
    Case(B=1, n=65, H=2, Hkv=2, dh=24),
    Case(B=1, n=65, H=2, Hkv=2, dh=44, mask="holes"),
    Case(B=1, n=130, H=2, Hkv=2, dh=80, window=(17, 9)),
]


OPTIONS = [{}, dict(additive_mask=True, normalize=True), dict(stabilizer=1e-3)]
# n = 65 takes two blocks of queries in the reference
EXACT = [Case(n=1), Case(n=9), Case(n=8, mask="holes"), Case(n=8, window=(3, 0)), Case(n=65, mask="right")]


@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("additive_mask", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_reference_is_the_definition(normalize, additive_mask, gradient, case):
    args = inputs(case, torch.float64)
    if not gradient:
        args["grad_o"] = None
    alpha, relevance, weighted = exact_map(args)
    dots = args["q"] @ args["k"].mT
    passed = relevance
    if additive_mask:
        score = dots * args["scaling"]
        passed = safe_divide(relevance, score) * score
        kept = passed.sum((1, 2, 3))
        c = safe_divide(safe_divide(kept.abs(), kept.abs()) * relevance.sum((1, 2, 3)), kept)
        passed = passed * c[:, None, None, None]
    u = safe_divide(passed, dots)
    r = torch.rand(case.B, 2, case.n, dtype=torch.float64)
    weights = r / (1 + weighted.sum(-1))[:, None] if normalize else r
    expected = (
        args["q"] * (u @ args["k"]) / 2,
        args["k"] * (u.mT @ args["q"]) / 2,
        args["v"] * (alpha.mT @ args["s"]) / 2,
        weighted.sum(-1),
        weights + weights @ weighted,
    )
    options = dict(additive_mask=additive_mask, normalize=normalize)
    out = relevance_attention(**args, r=r, **options, backend="reference")
    for got, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert torch.equal(relevance_rollout_step(r, **args, normalize=normalize, backend="reference"), out[4])
    torch.testing.assert_close(relevance_maps(**args, backend="reference"), weighted)
    rows = torch.randint(case.n, (case.B, 2))
    some = relevance_maps(**args, rows=rows, backend="reference")
    torch.testing.assert_close(some, weighted.gather(1, rows[..., None].expand(-1, -1, case.n)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case, options",
    sweep(product(CASES, OPTIONS), zip(CASES, cycle(OPTIONS), strict=False)),
    ids=str,
)
def test_kernel_is_as_good_as_torch(case, options, kernel):
    for compare in until_enough(factor(kernel)):
        args = inputs(case)
        if "stabilizer" in options:
            args["grad_o"] = None
        r = torch.rand(case.B, 3, case.n)
        exact = relevance_attention(**doubled(args), r=r.double(), **options, backend="reference")
        torch_out = relevance_attention(**args, r=r, **options, backend="reference")
        with running(kernel) as backend:
            out = relevance_attention(**args, r=r, **options, backend=backend)
            again = relevance_attention(**args, **options, backend=backend)
        for values in zip(out, exact, torch_out, strict=True):
            compare(*values)
        assert again[4] is None and all(torch.equal(*pair) for pair in zip(out[:4], again[:4], strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps_and_rollout_step(case, kernel):
    for compare in until_enough(factor(kernel)):
        args = inputs(case)
        wide = doubled(args)
        rows, r = torch.randint(0, case.n, (case.B, 4)), torch.rand(case.B, 3, case.n)
        with running(kernel) as backend:
            maps = relevance_maps(**args, backend=backend)
            some = relevance_maps(**args, rows=rows, backend=backend)
            step = relevance_rollout_step(r, **args, normalize=True, backend=backend)
        exact, torch_out = (
            relevance_maps(**wide, backend="reference"),
            relevance_maps(**args, backend="reference"),
        )
        compare(maps, exact, torch_out)
        index = rows[:, :, None].expand(-1, -1, case.n)
        compare(some, exact.gather(1, index), relevance_maps(**args, rows=rows, backend="reference"))
        exact = relevance_rollout_step(r.double(), **wide, normalize=True, backend="reference")
        compare(step, exact, relevance_rollout_step(r, **args, normalize=True, backend="reference"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_may_hold_anything_in_the_scores(kernel):
    """The score of a masked key is not in lse: its exponential may be inf."""
    args = inputs(Case(n=40, mask="right"))
    dirty = args | dict(k=args["k"].clone())
    dirty["k"].transpose(1, 2)[~args["key_mask"]] = 1e4
    with running(kernel) as backend:
        assert torch.equal(relevance_maps(**dirty, backend=backend), relevance_maps(**args, backend=backend))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("peak", [1, 100, 600])
def test_additive_mask_of_peaked_scores_and_small_relevance(peak, scale, kernel):
    """Scores of some hundreds, whose lse is as large and whose probabilities underflow, and relevance down to
    the subnormal numbers.
    """
    args = inputs(Case(n=13))
    args["q"] *= -peak
    _, lse = attention(args["q"].double(), args["k"].double(), args["v"].double(), scaling=args["scaling"])
    args |= dict(lse=lse.float(), s=args["s"] * scale)
    exact = relevance_attention(**doubled(args), additive_mask=True, backend="reference")
    with running(kernel) as backend:
        out = relevance_attention(**args, additive_mask=True, backend=backend)
    # 8 products and their sum, the scaling and lse round a score 18 times by 2^-24 of the largest. alpha is
    # off by as much, and c, a quotient of sums of it, by as much once more. Below the normal numbers a result
    # of 13 terms has 13 roundings of 2^-149.
    top = float((args["q"].double() @ args["k"].double().mT).abs().max() * args["scaling"])
    for got, wanted in zip(out[:4], exact[:4], strict=True):
        bound = 2 * 18 * 2.0**-24 * max(1.0, top) * wanted.abs().max() + 13 * 2.0**-149
        assert got.isfinite().all() and ((got.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_empty(kernel):
    t, lse = torch.zeros(0, 2, 3, 4), torch.zeros(0, 2, 3)
    with running(kernel) as backend:
        out = relevance_attention(t, t, t, lse, t, t, backend=backend)
        assert [o.shape for o in out[:4]] == [t.shape] * 3 + [(0, 3)]
        assert relevance_maps(t, t, t, lse, t, t, backend=backend).shape == (0, 3, 3)

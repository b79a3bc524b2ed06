import pytest
import torch
from direct import attention_probabilities, decomposed_vectors
from numerics import until_enough
from pair_cases import (
    KERNELS,
    Case,
    alone,
    assert_threads_change_nothing,
    check_huge_squares,
    doubled,
    factor,
    layer,
    pair_args,
    running,
    spread_all,
    with_dirty_padding,
)

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.ops import pair_norms

DIRECT = [
    Case(norms=0, residual=False, n=5),
    Case(norms=0, n=7),
    Case(norms=1, n=6, H=6, Hkv=2),
    Case(norms=2, n=9, mask="holes"),
    Case(norms=2, n=8, mask="right", window=(-1, 0)),
    Case(norms=2, n=8, window=(2, 1), residual=False),
]

# few pairs come in many examples
CASES = [
    Case(B=150, n=1),
    Case(B=40, n=2, H=1, Hkv=1, dh=1),
    Case(B=3, n=13, H=5, Hkv=1, dh=3, d=7),
    Case(n=64),
    Case(n=65, H=3, Hkv=3, dh=5),
    Case(B=1, n=131, H=6, Hkv=2, norms=1),
    Case(n=97, H=2, Hkv=1, dh=33, residual=False, norms=0),
    Case(B=1, n=197, H=12, Hkv=12, dh=64, d=96),
    Case(B=4, n=71, mask="right"),
    Case(B=4, n=71, mask="left", H=3, Hkv=1),
    Case(B=4, n=71, mask="holes", norms=1),
    Case(B=60, n=5, mask="single"),
    Case(n=83, window=(-1, 0)),
    Case(n=83, window=(-1, 0), mask="left"),
    Case(n=150, window=(17, 9), mask="holes"),
    Case(n=150, window=(0, 0)),
    Case(n=150, window=(3, -1), residual=False),
    Case(n=67, dtype=torch.bfloat16),
    Case(n=65, H=3, Hkv=1, dh=7, dtype=torch.bfloat16),
    Case(n=67, dtype=torch.float16, mask="holes"),
    Case(n=50, peak=40.0),
]


def check(kernel, draw):
    """The error rule, for the norms' squares and for the norms, of arguments that draw() makes.

    Where the heads' vectors cancel, the root amplifies rounding, and the largest error is that of a few such
    pairs. There torch's G a cancels before it is multiplied by a; kernels that fold G add 2 G[g, h] a[h]
    once, and the rounding of terms twice as large stays: factor 2 on top of the rule's 2.
    """
    for compare in until_enough(factor(kernel)):
        args = draw()
        with running(kernel) as backend:
            out = pair_norms(**args, backend=backend)
        exact = pair_norms(**doubled(args), backend="reference")
        torch_out = pair_norms(**args, backend="reference")
        compare(out.square(), exact.square(), torch_out.square())
        compare(out, exact, torch_out, 2 * factor(kernel))


@pytest.mark.parametrize("case", DIRECT, ids=str)
def test_reference_is_the_papers_definition(case):
    t = layer(case)
    alpha = attention_probabilities(
        t["q"].double(), t["k"].double(), t["key_mask"], t["scaling"], case.window
    )
    vectors = decomposed_vectors(
        alpha, t["v"], t["weight"], t["x"] if case.residual else None, t["gammas"], t["rstd"]
    )
    expected = vectors.norm(dim=-1)
    if t["key_mask"] is not None:
        real = t["key_mask"]
        expected = expected * (real[:, :, None] & real[:, None, :])
    args = doubled(pair_args(case, t))
    out = pair_norms(**args, backend="reference")
    # lse, G and c were rounded to float32 on the way: a few times 2^-24 of |lse| <= 8
    torch.testing.assert_close(out, expected, rtol=64 * 2.0**-24, atol=64 * 2.0**-24 * float(expected.max()))
    rows = torch.randint(0, case.n, (case.B, 4))
    index = rows[:, :, None].expand(-1, -1, case.n)
    torch.testing.assert_close(pair_norms(**args, rows=rows, backend="reference"), out.gather(1, index))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_as_good_as_torch(case, kernel):
    check(kernel, lambda: pair_args(case))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case", [Case(n=77), Case(n=77, mask="holes"), Case(n=77, window=(-1, 0)), Case(B=70, n=1)], ids=str
)
def test_rows_are_those_of_the_full_matrix(case, kernel):
    args = pair_args(case)
    with running(kernel) as backend:
        full = pair_norms(**args, backend=backend)
        for count in (1, 5, 70):
            rows = torch.randint(0, case.n, (case.B, count))
            out = pair_norms(**args, rows=rows, backend=backend)
            assert torch.equal(out, full.gather(1, rows[:, :, None].expand(-1, -1, case.n)))
        assert pair_norms(**args, rows=torch.zeros(case.B, 0, dtype=torch.int64), backend=backend).shape == (
            case.B,
            0,
            case.n,
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(kernel, dtype):
    args = pair_args(Case(n=37, dh=7, mask="holes", dtype=dtype))
    strided = spread_all(args)
    assert not strided["gram"].is_contiguous() and strided["q"].stride(-1) == 2
    with running(kernel) as backend:
        assert torch.equal(pair_norms(**strided, backend=backend), pair_norms(**args, backend=backend))
    check(
        kernel,
        lambda: (
            args | dict(gram=torch.full((), 1 / 16).expand_as(args["gram"]), cross=None, residual_sq=None)
        ),
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [dict(B=0), dict(n=0)], ids=str)
def test_empty(shape, kernel):
    case = Case(**shape)
    B, H, n = case.B, case.H, case.n
    q, gram = torch.zeros(B, H, n, 8), torch.zeros(B, n, H, H)
    with running(kernel) as backend:
        assert pair_norms(q, q, torch.zeros(B, H, n), gram, backend=backend).shape == (B, n, n)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padded_batch_equals_its_examples_alone(kernel):
    args = pair_args(Case(B=5, n=90, mask="right"))
    with running(kernel) as backend:
        out = pair_norms(**args, backend=backend)
        for b, count in enumerate(args["key_mask"].sum(1).tolist()):
            single = pair_norms(**alone(args, b, count), backend=backend)[0]
            assert torch.equal(single, out[b, :count, :count])
            assert not out[b, count:].any() and not out[b, :, count:].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_stays_where_it_is(kernel):
    args = pair_args(Case(B=1, n=70))
    args["q"] = args["q"].clone()
    args["q"][0, 1, 5] = torch.nan
    with running(kernel) as backend:
        out = pair_norms(**args, backend=backend)
    assert out[0, 5].isnan().all()
    out[0, 5] = 0
    assert torch.isfinite(out).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
def test_sums_that_overflow(kernel):
    with running(kernel) as backend:
        check_huge_squares(backend)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_may_hold_anything(kernel):
    args = pair_args(Case(n=40, mask="holes"))
    dirty = with_dirty_padding(args)
    with running(kernel) as backend:
        assert torch.equal(pair_norms(**dirty, backend=backend), pair_norms(**args, backend=backend))


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_do_not_change_the_result(kernel):
    args = pair_args(Case(B=3, n=150, mask="right"))
    assert_threads_change_nothing(kernel, lambda backend: pair_norms(**args, backend=backend))


def test_arguments_are_checked():
    args = pair_args(Case(n=6))
    q = args["q"]
    for wrong, error, message in [
        (dict(q=q[0]), ValueError, "pair_norms: q must be"),
        (dict(gram=args["gram"][:, :5]), ValueError, "pair_norms: gram must be"),
        (dict(k=args["k"].double()), TypeError, "one dtype"),
        (dict(q=q.long(), k=args["k"].long()), TypeError, "floating-point"),
        (dict(cross=None), ValueError, "given together"),
        (dict(rows=torch.full((2, 1), 6)), ValueError, r"rows must lie in \[0, 6\)"),
        (dict(rows=torch.zeros(2, 1, dtype=torch.int32)), TypeError, "rows must be int64"),
        (dict(backend="fast"), ValueError, "backend must be one of"),
    ]:
        with pytest.raises(error, match=message):
            pair_norms(**args | wrong)


@pytest.mark.parametrize("kernel", KERNELS[:1])
def test_named_backend_refuses_with_reasons(kernel):
    args = doubled(pair_args(Case(n=6)))
    with (
        running(kernel) as backend,
        pytest.raises(ValueError, match="computes in float32, got torch.float64"),
    ):
        pair_norms(**args, backend=backend)
    assert pair_norms(**args).dtype == torch.float64


def test_opcheck():
    args = pair_args(Case(n=9, mask="holes"))
    inputs = PairInputs(**args)
    rows = torch.tensor([[0, 3], [8, 8]])
    for last in (None, rows):
        torch.library.opcheck(torch.ops.pyglobenc.pair_norms.default, (*inputs.flat(), last, "auto"))

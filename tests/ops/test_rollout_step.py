import math

import pytest
import torch
from direct import attention_probabilities, decomposed_vectors
from numerics import until_enough
from pair_cases import (
    KERNELS,
    Case,
    alone,
    assert_threads_change_nothing,
    doubled,
    factor,
    layer,
    pair_args,
    running,
    spread_all,
)

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.ops import pair_norms, rollout_step

CASES = [
    (Case(B=150, n=1), 1),
    (Case(B=40, n=2, H=1, Hkv=1, dh=1), 2),
    (Case(B=3, n=13, H=5, Hkv=1, dh=3, d=7), 3),
    (Case(n=64), 1),
    (Case(n=65, H=3, Hkv=3, dh=5), 17),
    (Case(B=1, n=131, H=6, Hkv=2, norms=1), 5),
    (Case(n=97, H=2, Hkv=1, dh=33, residual=False, norms=0), 1),
    (Case(B=1, n=197, H=12, Hkv=12, dh=64, d=96), 1),
    (Case(B=1, n=70), 300),
    (Case(B=4, n=71, mask="right"), 2),
    (Case(B=4, n=71, mask="left", H=3, Hkv=1), 1),
    (Case(B=4, n=71, mask="holes", norms=1), 4),
    (Case(B=60, n=5, mask="single"), 1),
    (Case(n=83, window=(-1, 0)), 1),
    (Case(n=150, window=(17, 9), mask="holes"), 2),
    (Case(n=150, window=(0, 0)), 1),
    (Case(n=67, dtype=torch.bfloat16), 1),
    (Case(n=65, H=3, Hkv=1, dh=7, dtype=torch.bfloat16), 2),
    (Case(n=67, dtype=torch.float16, mask="holes"), 2),
    (Case(n=50, peak=40.0), 2),
]


def rows_of(case, count):
    """Random rows (B, T, n), the first of them with zeros, and their log scale (B, T)."""
    r = torch.rand(case.B, count, case.n)
    r[:, 0] *= torch.rand(case.n) < 0.7
    return r, torch.randn(case.B, count)


@pytest.mark.parametrize("case", [Case(n=9, mask="holes"), Case(n=8, H=6, Hkv=2, window=(-1, 0))], ids=str)
def test_reference_is_the_papers_definition(case):
    t = layer(case)
    alpha = attention_probabilities(
        t["q"].double(), t["k"].double(), t["key_mask"], t["scaling"], case.window
    )
    norms = decomposed_vectors(alpha, t["v"], t["weight"], t["x"], t["gammas"], t["rstd"]).norm(dim=-1)
    r, log_scale = (s.double() for s in rows_of(case, 3))
    if t["key_mask"] is not None:
        norms = norms * (t["key_mask"][:, :, None] & t["key_mask"][:, None, :])
    out, out_scale = rollout_step(r, log_scale, **doubled(pair_args(case, t)), backend="reference")
    expected = r @ norms * log_scale.exp()[..., None]
    # lse, G and c were rounded to float32 on the way: a few times 2^-24 of |lse| <= 8
    torch.testing.assert_close(out * out_scale.exp()[..., None], expected, rtol=64 * 2.0**-24, atol=0)
    assert torch.equal(out.amax(-1), torch.ones_like(out_scale))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case, count", CASES, ids=lambda value: str(value))
def test_kernel_is_as_good_as_torch(case, count, kernel):
    for compare in until_enough(factor(kernel)):
        args = pair_args(case)
        r, log_scale = rows_of(case, count)
        with running(kernel) as backend:
            out, out_scale = rollout_step(r, log_scale, **args, backend=backend)
        exact, exact_scale = rollout_step(
            r.double(), log_scale.double(), **doubled(args), backend="reference"
        )
        torch_out, torch_scale = rollout_step(r, log_scale, **args, backend="reference")
        assert torch.equal(exact_scale.isfinite(), out_scale.isfinite())
        # compared before the rescaling, which divides by the largest entry; that it is 1 holds the scales to
        # the same rule
        assert torch.equal(out.amax(-1), exact.amax(-1).float())
        results = ((out, out_scale), (exact, exact_scale), (torch_out, torch_scale))
        unscaled = [scale.double().exp()[..., None] * rows.double() for rows, scale in results]
        compare(unscaled[0].float(), unscaled[1], unscaled[2].float())


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_the_product_with_the_norms(kernel):
    case = Case(n=90, mask="holes", window=(30, 40))
    args = pair_args(case)
    r, log_scale = rows_of(case, 4)
    with running(kernel) as backend:
        out, out_scale = rollout_step(r, log_scale, **args, backend=backend)
        product = r.double() @ pair_norms(**args, backend=backend).double()
    # n terms, none negative, summed in float32
    torch.testing.assert_close(
        (out_scale - log_scale).double().exp()[..., None] * out.double(),
        product,
        rtol=case.n * 2.0**-24,
        atol=0,
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_scale_survives_many_layers(kernel):
    args = pair_args(Case(n=40))
    r, log_scale = torch.eye(40)[None, :2].repeat(2, 1, 1), torch.zeros(2, 2)
    with running(kernel) as backend:
        for _ in range(60):
            r, log_scale = rollout_step(r, log_scale, **args, backend=backend)
    assert torch.equal(r.amax(-1), torch.ones(2, 2))
    assert (log_scale > math.log(torch.finfo(torch.float32).max)).all() and log_scale.isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_zeros_stay_zero(kernel):
    args = pair_args(Case(n=40))
    r, log_scale = torch.zeros(2, 3, 40), torch.zeros(2, 3)
    r[:, 1, 7] = 1
    with running(kernel) as backend:
        out, out_scale = rollout_step(r, log_scale, **args, backend=backend)
    assert not out[:, 0].any() and not out[:, 2].any() and torch.equal(out_scale[:, 0], log_scale[:, 0])
    assert out[:, 1].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_strided_and_padded(kernel):
    case = Case(B=5, n=90, mask="right")
    args = pair_args(case)
    r, log_scale = rows_of(case, 2)
    dirty = r.masked_fill(~args["key_mask"][:, None], torch.nan)
    with running(kernel) as backend:
        out, out_scale = rollout_step(r, log_scale, **args, backend=backend)
        again = rollout_step(r.mT.contiguous().mT, log_scale, **spread_all(args), backend=backend)
        assert torch.equal(out, again[0]) and torch.equal(out_scale, again[1])
        assert torch.equal(out, rollout_step(dirty, log_scale, **args, backend=backend)[0])
        for b, count in enumerate(args["key_mask"].sum(1).tolist()):
            single, single_scale = rollout_step(
                r[b : b + 1, :, :count], log_scale[b : b + 1], **alone(args, b, count), backend=backend
            )
            assert torch.equal(single[0], out[b, :, :count]) and torch.equal(single_scale[0], out_scale[b])
            assert not out[b, :, count:].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("B, T, n", [(0, 1, 4), (2, 0, 4)])
def test_empty(B, T, n, kernel):
    q, gram = torch.zeros(B, 4, n, 8), torch.zeros(B, n, 4, 4)
    with running(kernel) as backend:
        out, scale = rollout_step(
            torch.zeros(B, T, n), torch.zeros(B, T), q, q, torch.zeros(B, 4, n), gram, backend=backend
        )
    assert out.shape == (B, T, n) and scale.shape == (B, T)


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_do_not_change_the_result(kernel):
    case = Case(B=3, n=150, mask="right")
    args, rows = pair_args(case), rows_of(case, 2)
    assert_threads_change_nothing(kernel, lambda backend: rollout_step(*rows, **args, backend=backend))


def test_arguments_are_checked():
    args = pair_args(Case(n=6))
    r, log_scale = torch.rand(2, 1, 6), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="rollout_step: r must be"):
        rollout_step(r[0], log_scale, **args)
    with pytest.raises(ValueError, match="rollout_step: log_scale must be"):
        rollout_step(r, log_scale[:1], **args)
    with pytest.raises(TypeError, match="one dtype"):
        rollout_step(r.double(), log_scale, **args)


def test_opcheck():
    case = Case(n=9, mask="holes")
    args, (r, log_scale) = pair_args(case), rows_of(case, 2)
    inputs = PairInputs(**args)
    torch.library.opcheck(torch.ops.pyglobenc.rollout_step.default, (*inputs.flat(), r, log_scale, "auto"))


def test_a_scale_of_another_dtype_keeps_it():
    case = Case(n=9)
    args, (r, log_scale) = pair_args(case), rows_of(case, 2)
    out, scale = rollout_step(r, log_scale.double(), **args)
    expected, added = rollout_step(r, torch.zeros_like(log_scale), **args)
    assert torch.equal(out, expected) and torch.equal(scale, log_scale.double() + added)

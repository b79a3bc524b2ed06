"""Sequences packed into one give what each gives alone."""

import pytest
import torch
from numerics import pooled, until_enough
from pair_cases import KERNELS, Case, doubled, factor, layer, pair_args, product, running
from sweeps import slow, sweep

from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.score_mods import SoftCap
from pyglobenc.ops import add_relevance, attention, relevance_attention, relevance_rollout_step, rollout_step

AXES = {"q": 2, "k": 2, "v": 2, "lse": 2, "gram": 1, "cross": 1, "residual_sq": 1, "rstd": 1}
# lengths of the sequences: alone, of one token, of one length side by side, longer than a block of keys and
# of queries
CASES = [
    (Case(H=3, Hkv=3, dh=5), (1,), 50),
    (Case(), (1, 1, 1, 2, 1), 20),
    (Case(H=6, Hkv=2), (7, 7, 33, 5, 5, 5, 18), 1),
    (Case(norms=1), (64, 65, 3), 6),
    (Case(H=12, Hkv=12, dh=64, d=96), (41, 70, 9), 1),
    (Case(H=5, Hkv=1, residual=False, norms=0), (90, 1, 30), 17),
    (Case(window=(-1, 0)), (20, 20, 45), 1),
    (Case(window=(6, 3)), (2, 50, 19), 2),
    (Case(dtype=torch.bfloat16), (33, 8, 8), 1),
    (Case(dtype=torch.float16, peak=4.0), (16, 32, 5), 1),
]
# for the interpreter: rows for two passes, and a block of keys and one more
FEW = [
    CASES[1],
    (Case(H=2, Hkv=2, norms=1), (33, 65, 3), 8),
    (Case(H=3, Hkv=1, residual=False, norms=0), (40, 1, 24), 17),
    CASES[7],
]


def pack(case, lengths, count):
    """Each sequence's arguments of `pair_norms` with rows r (1, T, n), the same packed, and cu_seqlens."""
    alone = []
    for n in lengths:
        shape = Case(**vars(case) | dict(B=1, n=n))
        alone.append(pair_args(shape) | dict(r=torch.rand(1, count, n)))
    packed = dict(alone[0])
    for name, axis in (AXES | {"r": 2}).items():
        if packed.get(name) is not None:
            packed[name] = torch.cat([one[name] for one in alone], axis)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return alone, packed, ends.to(torch.int32)


def step(args, log_scale, backend, cu_seqlens=None):
    """Rows and scales of `rollout_step`."""
    args = dict(args)
    return rollout_step(args.pop("r"), log_scale, **args, cu_seqlens=cu_seqlens, backend=backend)


def cases(cases):
    return pytest.mark.parametrize("case, lengths, count", cases, ids=lambda value: str(value))


@cases(CASES)
def test_reference_is_each_sequence_alone(case, lengths, count):
    alone, packed, cu_seqlens = pack(case, lengths, count)
    log_scale = torch.randn(len(lengths), count, dtype=torch.float64)
    out, scale = step(doubled(packed), log_scale, "reference", cu_seqlens)
    for s, one in enumerate(alone):
        exact, exact_scale = step(doubled(one), log_scale[s : s + 1], "reference")
        torch.testing.assert_close(out[:, :, cu_seqlens[s] : cu_seqlens[s + 1]], exact, rtol=1e-12, atol=0)
        torch.testing.assert_close(scale[s : s + 1], exact_scale, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_keeps_its_scale():
    _, packed, cu_seqlens = pack(Case(), (4, 6), 2)
    packed["r"][:, 1, 4:] = 0
    out, scale = step(packed, torch.ones(2, 2), "reference", cu_seqlens)
    assert (
        not out[0, 1, 4:].any()
        and scale[1, 1] == 1
        and out[0, 1, :4].amax() == 1
        and out[0, 0, 4:].amax() == 1
    )


@pytest.mark.parametrize("score_mod", [None, SoftCap(2.0)], ids=["plain", "softcap"])
@cases(CASES)
def test_attention_is_each_sequence_alone(case, lengths, count, score_mod):
    N = sum(lengths)
    t = layer(Case(**vars(case) | dict(B=1, n=N)))
    q, k, v = (t[name].double().requires_grad_() for name in ("q", "k", "v"))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    settings = dict(scaling=t["scaling"], window=case.window, score_mod=score_mod)
    o, lse = attention(q, k, v, **settings, cu_seqlens=cu_seqlens)
    parts = [
        attention(*(x[:, :, a:b] for x in (q, k, v)), **settings)
        for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)
    ]
    torch.testing.assert_close(o, torch.cat([part[0] for part in parts], 2), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, torch.cat([part[1] for part in parts], 2), rtol=1e-12, atol=1e-13)
    weights = torch.randn_like(o)
    found = torch.autograd.grad((o * weights).sum(), (q, k, v))
    exact = torch.autograd.grad((torch.cat([part[0] for part in parts], 2) * weights).sum(), (q, k, v))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_cu_seqlens_are_checked():
    _, packed, cu_seqlens = pack(Case(), (4, 6), 1)
    log_scale = torch.zeros(2, 1)
    for wrong, message in (
        (
            cu_seqlens.long(),
            r"cu_seqlens must be \(S \+ 1,\) int32 on the CPU with S at least 1, got \(3,\) torch.int64 on "
            "cpu",
        ),
        (cu_seqlens[:1], r"got \(1,\) torch.int32 on cpu"),
        (cu_seqlens[:2], "must increase from 0 to n = 10, got"),
        (cu_seqlens[[0, 1, 1, 2]], "must increase from 0 to n = 10, got"),
    ):
        with pytest.raises(ValueError, match=message):
            step(packed, log_scale, "auto", wrong)
    with pytest.raises(ValueError, match=r"log_scale must be \(S, T\) with S=2, T=1"):
        step(packed, log_scale[:1], "auto", cu_seqlens)
    with pytest.raises(ValueError, match="a batch of 1 without key_mask, got 1 and one"):
        step(packed | dict(key_mask=torch.ones(1, 10, dtype=torch.bool)), log_scale, "auto", cu_seqlens)
    with pytest.raises(ValueError, match="a batch of 1 without key_mask, got 2"):
        attention(*torch.zeros(3, 2, 1, 10, 4), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    "kernel, cases",
    [
        *(pytest.param(*kernel.values, CASES, marks=kernel.marks) for kernel in KERNELS),
        ("triton", FEW),
        slow("triton", CASES),
    ],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_kernel_is_as_good_as_torch(kernel, cases):
    with pooled(factor(kernel)) as compare:
        for case in cases:
            check_kernel(kernel, *pack(*case)[1:], compare)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_on_unit_rows(kernel):
    # whole blocks of queries without weight are passed over
    ones = torch.tensor([[[149, 150, 300, 422], [0, 219, 220, 420]]])
    _, packed, cu_seqlens = pack(Case(H=3, Hkv=3), (150, 70, 200, 3), 2)
    units = torch.zeros_like(packed["r"]).scatter_(2, ones, 1)
    with pooled(factor(kernel)) as compare:
        for r in (units, units * 0):
            check_kernel(kernel, packed | dict(r=r), cu_seqlens, compare)


def check_kernel(kernel, packed, cu_seqlens, compare):
    """The error rule for the product of packed rows r with the norms; compare: of `pooled`."""
    args = dict(packed)
    r = args.pop("r")
    exact = product(r.double(), doubled(args), "reference", cu_seqlens)
    with running(kernel) as backend:
        out, torch_out = (
            product(r, args, name, cu_seqlens, float(exact.amax())) for name in (backend, "reference")
        )
    compare(out, exact, torch_out)


def test_opcheck():
    _, packed, cu_seqlens = pack(Case(), (4, 6), 2)
    r = packed.pop("r")
    inputs = PairInputs(**packed, cu_seqlens=cu_seqlens)
    torch.library.opcheck(
        torch.ops.pyglobenc.rollout_step.default, (*inputs.flat(), r, torch.randn(2, 2), "auto")
    )


# lengths side by side, one of a token, more than a block of queries
RELEVANCE = [((7, 7, 33, 5, 5, 5, 18), 2), ((64, 65, 3), 3), ((130, 1, 30), 11)]
AXES_OF = {relevance_attention: (2, 2, 2, 1, 2), relevance_rollout_step: (2,), add_relevance: (1, 1)}


def relevance_args(lengths, count, heads=2, dh=16):
    """Arguments of `relevance_attention` of each sequence alone, the same packed, and cu_seqlens.

    All but the gradients are positive: where sums cancel, the largest errors are those of a few numbers near
    0, and a matter of luck.
    """
    alone = []
    for n in lengths:
        q, k, v, s = (torch.rand(1, heads, n, dh) + 0.1 for _ in range(4))
        grad_o = torch.randn(1, heads, n, dh)
        _, lse = attention(q.double(), k.double(), v.double())
        alone.append(dict(q=q, k=k, v=v, lse=lse.float(), grad_o=grad_o, s=s, r=torch.rand(1, count, n)))
    return alone, packed_together(alone, 2), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed_together(alone, axis):
    return {name: torch.cat([one[name] for one in alone], axis) for name in alone[0]}


def of_sequences(op, alone, axes, **options):
    """What the reference gives of each sequence in float64, and in float32, packed."""
    outs = []
    for convert in (doubled, dict):
        each = [op(**convert(one), **options, backend="reference") for one in alone]
        each = [out if isinstance(out, tuple) else (out,) for out in each]
        outs.append(
            [torch.cat(parts, axis) for parts, axis in zip(zip(*each, strict=True), axes, strict=True)]
        )
    return outs


def run_packed(op, backend, alone, **options):
    """What a backend gives of sequences packed, as a tuple."""
    axis = AXES_OF[op][0]
    lengths = [next(iter(one.values())).shape[axis] for one in alone]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    with running(backend) as name:
        out = op(**packed_together(alone, axis), **options, cu_seqlens=cu_seqlens, backend=name)
    return out if isinstance(out, tuple) else (out,)


def check(op, backend, draw, **options):
    """The error rule, against the reference of each sequence alone, which draw() returns."""
    for compare in until_enough(factor(backend)):
        alone = draw()
        expected = of_sequences(op, alone, AXES_OF[op], **options)
        for values in zip(run_packed(op, backend, alone, **options), *expected, strict=True):
            compare(*values)


OPTIONS = [{}, dict(additive_mask=True, normalize=True), dict(window=(6, 3), stabilizer=1e-3)]


@pytest.mark.parametrize(
    "lengths, count, options",
    sweep(
        [(*case, options) for case in RELEVANCE for options in OPTIONS],
        [(*case, options) for case, options in zip(RELEVANCE, OPTIONS, strict=True)],
    ),
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_relevance_is_each_sequence_alone(backend, lengths, count, options):
    def draw():
        return relevance_args(lengths, count)[0]

    check(relevance_attention, backend, draw, **options)
    check(
        relevance_rollout_step,
        backend,
        draw,
        **{name: options[name] for name in ("normalize", "window") if name in options},
    )


@pytest.mark.parametrize("options", [{}, dict(stabilizer=1e-3), dict(rescale=False)], ids=str)
@pytest.mark.parametrize("lengths", [lengths for lengths, _ in RELEVANCE], ids=str)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_sums_of_a_sequence_are_its_own(backend, lengths, options):
    # terms that don't cancel: with random signs both errors are those of a few pairs near 0
    check(
        add_relevance,
        backend,
        lambda: [{name: torch.rand(1, n, 70) + 0.1 for name in "rab"} for n in lengths],
        **options,
    )


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("op", AXES_OF)
def test_sequences_of_a_token_or_two(op, lengths):
    alone = (
        [{name: torch.randn(1, n, 5) for name in "rab"} for n in lengths]
        if op is add_relevance
        else relevance_args(lengths, 2)[0]
    )
    alone = [doubled(one) for one in alone]
    exact = of_sequences(op, alone, AXES_OF[op])[0]
    for out, expected in zip(run_packed(op, "reference", alone), exact, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_relevance_without_a_rollout():
    alone, packed, cu_seqlens = relevance_args((4, 4, 9), 1)
    for args in (packed, *alone):
        del args["r"], args["grad_o"]
    out = relevance_attention(**packed, grad_o=None, cu_seqlens=cu_seqlens, backend="reference")
    expected = [relevance_attention(**one, grad_o=None, backend="reference") for one in alone]
    assert out[4] is None
    for got, wanted, axis in zip(
        out[:4], zip(*(one[:4] for one in expected), strict=True), (2, 2, 2, 1), strict=True
    ):
        torch.testing.assert_close(got, torch.cat(wanted, axis))


def test_relevance_refuses_wrong_cu_seqlens():
    _, packed, cu_seqlens = relevance_args((4, 9), 1)
    with pytest.raises(ValueError, match="relevance_attention: cu_seqlens must increase from 0 to n = 13"):
        relevance_attention(**packed, cu_seqlens=cu_seqlens[:2])
    with pytest.raises(
        ValueError, match="relevance_rollout_step: packed sequences are a batch of 1 without key_mask"
    ):
        relevance_rollout_step(**packed, key_mask=torch.ones(1, 13, dtype=torch.bool), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="add_relevance: packed sequences are a batch of 1"):
        add_relevance(*torch.zeros(3, 2, 13, 4), cu_seqlens=cu_seqlens)

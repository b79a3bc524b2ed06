"""Packed sequences in CUDA C++: emulated where there is no GPU."""

import pytest
import torch
from numerics import until_enough
from sweeps import slow, sweep
from test_packing import AXES_OF, of_sequences, packed_together, relevance_args

from pyglobenc.ops import add_relevance, relevance_attention, relevance_rollout_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# alone, of a token each, with more rows of the rollout than a pass takes, of a block of keys and one more
LENGTHS = [((1,), 1), ((1, 1, 2, 1), 2), ((7, 7, 33, 5, 5, 5, 18), 11), ((64, 65, 3), 3)]
OPTIONS = [{}, dict(normalize=True, window=(-1, 0)), dict(window=(6, 3), stabilizer=1e-3)]


@pytest.fixture(autouse=not torch.cuda.is_available())
def kernels(emulated):
    return emulated


def run(op, args, cu_seqlens=None, **options):
    """What the kernels give, as a list."""
    out = op(
        **{name: t.to(DEVICE) for name, t in args.items()}, **options, cu_seqlens=cu_seqlens, backend="cuda"
    )
    return [t.cpu() for t in (out if isinstance(out, tuple) else (out,))]


def run_packed(op, alone, lengths, **options):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return run(op, packed_together(alone, AXES_OF[op][0]), cu_seqlens, **options)


def assert_the_same(op, alone, lengths, **options):
    """No sequence changes another: each has every bit that the kernels give of it alone, where they are held
    to the reference.
    """
    each = zip(*(run(op, one, **options) for one in alone), strict=True)
    for out, parts, axis in zip(run_packed(op, alone, lengths, **options), each, AXES_OF[op], strict=True):
        assert torch.equal(out, torch.cat(parts, axis))


def assert_as_good(op, draw, lengths, **options):
    """The error rule, against the reference of each sequence alone, which draw() returns."""
    for compare in until_enough():
        alone = draw()
        expected = of_sequences(op, alone, AXES_OF[op], **options)
        for values in zip(run_packed(op, alone, lengths, **options), *expected, strict=True):
            compare(*values)


@pytest.mark.parametrize(
    "lengths, count, options",
    sweep(
        [(*case, options) for case in LENGTHS for options in OPTIONS],
        [(*case, OPTIONS[i % 3]) for i, case in enumerate(LENGTHS)],
    ),
    ids=str,
)
def test_relevance_of_a_sequence(lengths, count, options):
    alone = relevance_args(lengths, count, heads=2 if len(lengths) > 3 else 1)[0]
    assert_the_same(relevance_attention, alone, lengths, **options)
    options = {name: value for name, value in options.items() if name != "stabilizer"}
    assert_the_same(relevance_rollout_step, alone, lengths, **options)


@pytest.mark.parametrize("lengths, count", sweep(LENGTHS, LENGTHS[1:3]), ids=str)
def test_factor_of_the_additive_mask(lengths, count):
    alone = relevance_args(lengths, count)[0]
    each = zip(*(run(relevance_attention, one, additive_mask=True) for one in alone), strict=True)
    out = run_packed(relevance_attention, alone, lengths, additive_mask=True)
    for found, parts, axis in zip(out, each, AXES_OF[relevance_attention], strict=True):
        # the factor is rounded once, from float64 sums in another order, and so is its product
        torch.testing.assert_close(found, torch.cat(parts, axis), rtol=2.0**-22, atol=0)


def test_wide_heads():
    assert_the_same(relevance_attention, relevance_args((9, 1), 1, dh=136)[0], (9, 1))


@pytest.mark.parametrize(
    "options",
    [slow({}), dict(additive_mask=True, normalize=True), slow(dict(window=(6, 3), stabilizer=1e-3))],
    ids=str,
)
def test_relevance_is_as_good_as_torch(options):
    lengths = (32, 33, 3)
    assert_as_good(relevance_attention, lambda: relevance_args(lengths, 8, heads=1)[0], lengths, **options)


@pytest.mark.parametrize("options", [{}, dict(stabilizer=1e-3), dict(rescale=False)], ids=str)
@pytest.mark.parametrize("lengths", [lengths for lengths, _ in LENGTHS], ids=str)
def test_sums_of_a_sequence_are_its_own(lengths, options):
    assert_the_same(
        add_relevance, [{name: torch.randn(1, n, 70) for name in "rab"} for n in lengths], lengths, **options
    )


# the second of more tiles than blocks
@pytest.mark.parametrize("lengths, d", [((33, 1, 64), 70), slow((3, 258, 2), 1024)], ids=str)
def test_add_is_as_good_as_torch(lengths, d):
    # sums whose terms don't cancel: with random signs both errors are those of a few pairs near 0
    assert_as_good(
        add_relevance, lambda: [{name: torch.rand(1, n, d) + 0.1 for name in "rab"} for n in lengths], lengths
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the emulated launches")
@pytest.mark.parametrize("lengths", [(19,), (5, 9, 1, 4)], ids=str)
def test_launches_do_not_grow_with_the_sequences(lengths, kernels):
    alone, sums = (
        relevance_args(lengths, 1)[0],
        [{name: torch.randn(1, n, 8) for name in "rab"} for n in lengths],
    )
    kernels.launches()
    for op, each, options in (
        (relevance_attention, alone, dict(additive_mask=True)),
        (relevance_rollout_step, alone, dict(normalize=True)),
        (add_relevance, sums, {}),
    ):
        run_packed(op, each, lengths, **options)
        assert len(kernels.launches()) == 2

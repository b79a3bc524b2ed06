"""`pair_norms` and `rollout_step` of the GPU backends against the reference: on the GPU where there is one,
else Triton's interpreter.

The CUDA backend takes these tests over in cuda/test_pairs.py.
"""

from itertools import cycle

import pytest
import torch
from numerics import assert_as_good_as_torch, pooled
from pair_cases import Case, check_huge_squares, doubled, pair_args, product, spread_all, with_dirty_padding
from sweeps import in_parts, slow, sweep

from pyglobenc.backends.shared.launch import MAX_SHARES, query_shares
from pyglobenc.backends.shared.packing import sequence_of
from pyglobenc.backends.shared.rows import rescale_rows
from pyglobenc.kernels import _pairs
from pyglobenc.kernels.rollout_step import MAX_ROWS
from pyglobenc.ops import pair_norms, rollout_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = [
    Case(B=6, n=1, H=20, Hkv=20, dh=40),
    Case(n=64, norms=1),
    Case(n=65, H=3, Hkv=3, dh=5),
    Case(n=131, H=6, Hkv=2, residual=False, norms=0),
    Case(B=1, n=101, H=12, Hkv=12, dh=64, d=96),
    Case(n=17, H=64, Hkv=8, dh=40, d=96),
    Case(B=1, n=37, H=1, Hkv=1, dh=256),
    Case(B=3, n=71, mask="left"),
    Case(B=3, n=71, mask="holes", norms=1),
    Case(n=83, window=(-1, 0), mask="left"),
    Case(n=120, window=(17, 9), mask="holes"),
    Case(n=70, window=(0, 0)),
    Case(n=67, H=12, Hkv=4, dh=32, dtype=torch.bfloat16),
    Case(n=67, dtype=torch.float16, mask="right"),
    Case(n=50, peak=40.0),
    Case(n=43, H=6, Hkv=2, residual=False, norms=0),
]
# The others differ in sizes, or hide keys on the other side.
FEW = [CASES[i] for i in (0, 2, 15, 6, 8, 9, 12, 13, 14)]


@pytest.fixture
def backend(monkeypatch):
    if DEVICE == "cpu":
        # The interpreter takes the largest of a block number by number.
        monkeypatch.setattr("pyglobenc.kernels.rollout_step.BLOCK", 128)
    return "triton"


def factor(backend):
    """Of the error rule. A tensor core's sum is cut off, up to an ulp, where float32's is rounded, up to
    half: twice torch's own error.
    """
    return 4.0 if backend == "cuda" or DEVICE == "cuda" else 2.0


def moved(args: dict) -> dict:
    return {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in args.items()}


def rows_of(case, count):
    """Random rows (B, T, n), the first of them with zeros, and their log scale (B, T)."""
    r = torch.rand(case.B, count, case.n)
    r[:, 0] *= torch.rand(case.n) < 0.7
    return r.to(DEVICE), torch.randn(case.B, count).to(DEVICE)


def check_norms(backend, args, compare):
    """The error rule for norms and their squares; compare: of `pooled`."""
    out = pair_norms(**args, backend=backend)
    exact, torch_out = (
        pair_norms(**doubled(args), backend="reference"),
        pair_norms(**args, backend="reference"),
    )
    compare(out.square(), exact.square(), torch_out.square())
    compare(out, exact, torch_out)


def check_step(backend, r, args, compare, cu_seqlens=None):
    """The error rule for the product of rows r (B, T, n) with the norms; compare: of `pooled`."""
    exact = product(r.double(), doubled(args), "reference", cu_seqlens)
    out, torch_out = (
        product(r, args, name, cu_seqlens, float(exact.amax())) for name in (backend, "reference")
    )
    compare(out, exact, torch_out)


@pytest.mark.parametrize("cases", in_parts(CASES, FEW[1:]))
def test_pair_norms(cases, backend):
    with pooled(factor(backend)) as compare:
        for case in cases:
            check_norms(backend, moved(pair_args(case)), compare)


@pytest.mark.parametrize("case", sweep(CASES, [FEW[i] for i in (2, 4, 6)]), ids=str)
def test_rows_are_those_of_the_full_matrix(case, backend):
    args, rows = moved(pair_args(case)), torch.randint(0, case.n, (case.B, 3), device=DEVICE)
    every = pair_norms(**args, backend=backend)
    assert torch.equal(
        pair_norms(**args, rows=rows, backend=backend),
        every.gather(1, rows[..., None].expand(-1, -1, case.n)),
    )


@pytest.mark.parametrize(
    "cases, counts",
    [(FEW, (1, 3)), slow([case for case in CASES if case not in FEW], (1, 3)), slow(CASES, (3, 1))],
    ids=["some", "rest", "all with other counts"],
)
def test_rollout_step(cases, counts, backend):
    """Cases in turn with the first and the second number of rows."""
    with pooled(factor(backend)) as compare:
        for case, count in zip(cases, cycle(counts), strict=False):
            check_step(backend, rows_of(case, count)[0], moved(pair_args(case)), compare)


def test_more_rows_than_a_pass_takes(backend):
    case = Case(B=1, n=70)
    with pooled(factor(backend)) as compare:
        check_step(backend, rows_of(case, MAX_ROWS + 1)[0], moved(pair_args(case)), compare)


def cut_in(shares, monkeypatch):
    """Launchers cut the queries into so many parts."""
    for launcher in ("kernels.rollout_step", "kernels.pair_norms", "backends.cuda._pairs"):
        monkeypatch.setattr(f"pyglobenc.{launcher}.query_shares", lambda *args: shares)


@pytest.mark.parametrize("shares", sweep([1, 4], [4]))
def test_shares_of_the_queries_add_up(shares, monkeypatch, backend):
    case = Case(n=70, mask="holes", window=(40, 20))
    args = moved(pair_args(case))
    cut_in(shares, monkeypatch)
    with pooled(factor(backend)) as compare:
        check_step(backend, rows_of(case, 8)[0], args, compare)
        check_norms(backend, args, compare)


# blocks of 64 keys and tiles of 32 queries, then of 32 and 16, two blocks on each of 132 multiprocessors
@pytest.mark.parametrize("keys, queries, places, start", [(64, 32, 132, 2), (32, 16, 264, 3)])
@pytest.mark.parametrize("n", [1, 33, 500, 2048, 5000, 10_000, 131_072])
def test_no_multiprocessor_idles_for_long(n, keys, queries, places, start):
    blocks, tiles = -(-n // keys), -(-n // queries)
    shares = query_shares(blocks, tiles, places, start)
    assert 1 <= shares <= min(tiles, MAX_SHARES)
    # tiles that the busiest place takes, for those that it would take were all as busy
    busiest = -(-blocks * shares // places) * -(-tiles // shares)
    assert n < 2048 or blocks * tiles / places > 0.85 * busiest


def powers_of_two(B, n, window=(-1, -1), mask=None, cu_seqlens=None):
    """Arguments whose probabilities are 1 and whose norms are powers of two, and the norms in float64: no
    order of sums rounds anything.
    """
    zeros, sizes = torch.zeros(B, 1, n, 8), 2.0 ** torch.randint(-2, 3, (B, n))
    left, right = (n if side < 0 else side for side in window)
    ahead = torch.arange(n) - torch.arange(n)[:, None]
    seen = ((ahead <= right) & (-ahead <= left)).expand(B, n, n)
    if mask is not None:
        seen = seen & mask[:, None] & mask[:, :, None]
    if cu_seqlens is not None:
        sequence = sequence_of(cu_seqlens, cu_seqlens.device)
        seen = seen & (sequence == sequence[:, None])
    args = dict(
        q=zeros,
        k=zeros,
        lse=zeros[..., 0],
        gram=sizes.square()[..., None, None],
        key_mask=mask,
        scaling=1.0,
        window=window,
    )
    return moved(args), (seen * sizes[:, None]).double().to(DEVICE)


ROWS = {
    "padded": dict(shares=1, shape=(2, 5, 40)),
    "many shares": dict(shares=MAX_SHARES, shape=(2, 3, 9)),
    "longer than a block of threads": dict(shares=2, shape=(1, 2, 1050), window=(3, 1)),
    "packed": dict(shares=3, shape=(1, 5, 112), window=(40, 40), lengths=(1, 50, 7, 7, 45, 2)),
    "many packed": dict(shares=1, shape=(1, 1, 75), lengths=(1, 2) * 25),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_scaled_as_by_the_reference(case, monkeypatch, backend):
    case = dict(window=(-1, -1), lengths=None) | ROWS[case]
    (B, T, n), window, lengths = case["shape"], case["window"], case["lengths"]
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mask = None if B == 1 else torch.arange(n) < torch.tensor([[n], [n // 2]])
    args, norms = powers_of_two(B, n, window, mask, cu_seqlens)
    r, log_scale = (
        torch.randint(4, (B, T, n)).float().to(DEVICE),
        torch.randn(B if cu_seqlens is None else len(lengths), T).to(DEVICE),
    )
    r[:, 1:2] = 0
    cut_in(case["shares"], monkeypatch)
    out, scale = rollout_step(r, log_scale, **args, cu_seqlens=cu_seqlens, backend=backend)
    exact = r.double() @ norms
    expected, torch_scale = rescale_rows(exact.float(), log_scale, cu_seqlens)
    assert torch.equal(out, expected) and torch.equal(scale[:, 1:2], log_scale[:, 1:2])
    # the same numbers: a logarithm is rounded to 2 ulp at most, and the sum once
    assert ((scale - torch_scale).abs() <= 5 * 2.0**-24 * (scale.abs() + log_scale.abs())).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_that_are_not_finite(backend):
    args, norms = powers_of_two(1, 70)
    args["gram"][:, 33], norms[..., 33] = 2.0**120, 2.0**60
    r, log_scale = torch.ones(1, 4, 70, device=DEVICE), torch.randn(1, 4).to(DEVICE)
    # NaN, infinity, the products with one key beyond float32, and as they should be
    r[0, 0, 5], r[0, 1, 5], r[0, 2] = torch.nan, torch.inf, 2.0**70
    expected = rescale_rows((r.double() @ norms).float(), log_scale)
    torch.testing.assert_close(
        rollout_step(r, log_scale, **args, backend=backend), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sums_that_overflow(backend):
    check_huge_squares(backend, DEVICE)


def test_nan_stays_where_it_is(backend):
    args = moved(pair_args(Case(B=1, n=40)))
    args["q"] = args["q"].clone()
    args["q"][0, 1, 5] = torch.nan
    out = pair_norms(**args, backend=backend)
    assert out[0, 5].isnan().all()
    out[0, 5] = 0
    assert torch.isfinite(out).all()


def test_a_row_with_a_nan_is_not_scaled(backend):
    args, norms = powers_of_two(1, 300, window=(0, 0))
    r, log_scale = torch.full((1, 1, 300), 3.0, device=DEVICE), torch.randn(1, 1).to(DEVICE)
    expected = (r.double() @ norms).float()
    r[..., 200] = torch.nan
    out, scale = rollout_step(r, log_scale, **args, backend=backend)
    # and the keys whose tile it is in
    lost = out.isnan()
    assert lost[..., 200] and not lost[..., :100].any()
    assert torch.equal(out[~lost], expected[~lost]) and torch.equal(scale, log_scale)


@pytest.mark.parametrize("dtype", sweep([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str)
def test_every_tile(dtype, monkeypatch, backend):
    # smaller limits bring smaller tiles, keys read again and, last, none
    case = Case(B=1, n=37, H=12, Hkv=12, dh=64, d=96, dtype=dtype)
    args, tiles = moved(pair_args(case)), set()
    with pooled(factor(backend)) as compare:
        for limit in (232_448, 101_376, 65_536, 32_768, 16_384, 8_192):
            monkeypatch.setattr(_pairs, "shared_limit", lambda device, limit=limit: limit)
            found = _pairs.launch(12, 64, args["q"].element_size(), _pairs.float32_precision(), limit)
            if found is None:
                with pytest.raises(ValueError, match="no tile of 12 heads of 64 fits"):
                    pair_norms(**args, backend=backend)
            elif tuple(found.items()) not in tiles:
                tiles.add(tuple(found.items()))
                check_step(backend, rows_of(case, 12)[0], args, compare)
    assert found is None and len(tiles) > 2


def test_strided_inputs_and_expanded_gram(backend):
    args = moved(pair_args(Case(n=37, mask="holes")))
    strided = spread_all(args)
    assert strided["q"].stride(-1) == 2
    assert torch.equal(pair_norms(**strided, backend=backend), pair_norms(**args, backend=backend))
    r, log_scale = rows_of(Case(n=37), 2)
    out = rollout_step(r.mT.contiguous().mT, log_scale, **strided, backend=backend)
    assert torch.equal(out[0], rollout_step(r, log_scale, **args, backend=backend)[0])
    averaged = args | dict(
        gram=torch.full((), 1 / 16, device=DEVICE).expand_as(args["gram"]), cross=None, residual_sq=None
    )
    with pooled(factor(backend)) as compare:
        check_norms(backend, averaged, compare)


def test_padding_may_hold_anything(backend):
    args = moved(pair_args(Case(n=40, mask="holes")))
    r, log_scale = rows_of(Case(n=40), 2)
    padded = ~args["key_mask"]
    dirty = with_dirty_padding(args)
    assert torch.equal(pair_norms(**dirty, backend=backend), pair_norms(**args, backend=backend))
    out = rollout_step(r.masked_fill(padded[:, None], torch.nan), log_scale, **dirty, backend=backend)
    assert torch.equal(out[0], rollout_step(r, log_scale, **args, backend=backend)[0])


@pytest.mark.parametrize("B, T, n", [(0, 1, 4), (2, 0, 4)])
def test_empty(B, T, n, backend):
    q, gram = torch.zeros(B, 4, n, 8, device=DEVICE), torch.zeros(B, n, 4, 4, device=DEVICE)
    r, log_scale = torch.zeros(B, T, n, device=DEVICE), torch.zeros(B, T, device=DEVICE)
    out, scale = rollout_step(r, log_scale, q, q, torch.zeros(B, 4, n, device=DEVICE), gram, backend=backend)
    assert out.shape == (B, T, n) and scale.shape == (B, T)
    assert pair_norms(q[:0], q[:0], q[:0, ..., 0], gram[:0], backend=backend).shape == (0, n, n)


def test_refuses_with_reasons(backend):
    args = moved(pair_args(Case(n=6)))
    with pytest.raises(
        ValueError, match="needs gram in float32 and q in float16, bfloat16 or float32, got torch.float64"
    ):
        pair_norms(**doubled(args), backend=backend)
    wide = torch.zeros(1, 65, 2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="takes up to 64 heads of up to 256, got 65 of 8"):
        pair_norms(wide, wide, wide[..., 0], torch.zeros(1, 2, 65, 65, device=DEVICE), backend=backend)


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted where there is a GPU")
def test_auto_never_interprets(monkeypatch):
    args = pair_args(Case(n=6))
    expected = pair_norms(**args)
    monkeypatch.setattr("pyglobenc.kernels.pair_norms.run", None)
    assert torch.equal(pair_norms(**args), expected)


def emulated_tf32x3(a, b):
    """a @ b of float32 in three tf32 products as `_pairs.product`; the tensor cores cut what is left to
    tf32.
    """

    def cut(t, half=0):
        return ((t.contiguous().view(torch.int32) + half) & -8192).view(torch.float32)

    high_a, high_b = cut(a, 4096), cut(b, 4096)
    return high_a @ high_b + (cut(a - high_a) @ high_b + high_a @ cut(b - high_b))


def test_three_tf32_products_keep_float32():
    case = Case(B=2, n=60, H=12, Hkv=12, dh=64, d=768)
    args = pair_args(case)
    q, k, lse, gram = (args[name] for name in ("q", "k", "lse", "gram"))
    alpha = (
        (emulated_tf32x3(q, k.transpose(2, 3)) * args["scaling"] - lse[..., None]).exp().permute(0, 3, 2, 1)
    )
    sq = (emulated_tf32x3(alpha, gram) * alpha).sum(-1).transpose(1, 2)
    plain = args | dict(cross=None, residual_sq=None, rstd=None)
    exact = pair_norms(**doubled(plain), backend="reference").square()
    assert_as_good_as_torch(sq, exact, pair_norms(**plain, backend="reference").square())

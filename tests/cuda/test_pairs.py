"""`pair_norms` and `rollout_step` in CUDA C++: emulated where there is no GPU."""

import pytest
import test_packing
import torch
from models import build
from numerics import assert_as_good_as_torch, pooled
from pair_cases import Case, doubled, pair_args, product
from sweeps import in_parts, sweep
from test_kernels_pairs import (  # noqa: F401
    DEVICE,
    check_norms,
    check_step,
    factor,
    moved,
    rows_of,
    test_a_row_with_a_nan_is_not_scaled,
    test_empty,
    test_nan_stays_where_it_is,
    test_padding_may_hold_anything,
    test_pair_norms,
    test_refuses_with_reasons,
    test_rollout_step,
    test_rows_are_scaled_as_by_the_reference,
    test_rows_are_those_of_the_full_matrix,
    test_rows_that_are_not_finite,
    test_shares_of_the_queries_add_up,
    test_strided_inputs_and_expanded_gram,
    test_sums_that_overflow,
)
from test_kernels_relevance import far_memory

from pyglobenc import GlobEnc
from pyglobenc.ops import pair_norms

emulated_only = pytest.mark.skipif(DEVICE == "cuda", reason="needs the emulator")


@pytest.fixture(autouse=DEVICE == "cpu")
def without_a_gpu(emulated):
    return emulated


@pytest.fixture
def backend():
    return "cuda"


# what the Triton tests' cases leave out: forms of 16 heads and in blocks, long heads in half precision, keys
# that don't fit
SHAPES = [
    Case(B=1, n=90, H=16, Hkv=8, dh=80, d=96, dtype=torch.bfloat16),
    Case(B=1, n=70, H=16, Hkv=16, dh=64, d=96, mask="right"),
    Case(B=1, n=61, H=32, Hkv=8, dh=128, d=64, dtype=torch.bfloat16, mask="holes"),
    Case(B=1, n=40, H=17, Hkv=17, dh=40, d=64, window=(12, 0), dtype=torch.float16),
    Case(B=1, n=66, H=4, Hkv=4, dh=256, d=64, dtype=torch.bfloat16),
    Case(B=1, n=35, H=24, Hkv=24, dh=128, d=64),
]


@pytest.mark.parametrize("cases", in_parts(SHAPES, SHAPES[3:]))
def test_shapes(cases, backend):
    with pooled(factor(backend)) as compare:
        for case in cases:
            args = moved(pair_args(case))
            check_norms(backend, args, compare)
            check_step(backend, rows_of(case, 8)[0], args, compare)


def test_packed_sequences(backend):
    with pooled(factor(backend)) as compare:
        for case, lengths, count in test_packing.CASES:
            _, packed, cu_seqlens = test_packing.pack(case, lengths, count)
            args = moved(packed)
            check_step(backend, args.pop("r"), args, compare, cu_seqlens)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(axis, backend):
    case = Case(n=9, dtype=torch.float32)
    args = moved(pair_args(case))
    memory, used = far_memory(), 0

    def far(t):
        """t with its first and last entry along the axis 2^31 floats apart, along its last where it has
        fewer.
        """
        nonlocal used
        if not isinstance(t, torch.Tensor):
            return t
        at = min(axis, t.dim() - 1)
        rest = list(t.shape[:at] + t.shape[at + 1 :])
        steps = list(torch.empty(rest).stride())
        steps.insert(at, 2**31 // (t.shape[at] - 1))
        out = memory.as_strided(t.shape, steps, used).copy_(t)
        # 2^31 // 3 * 3 is not 2^31
        used += torch.Size(rest).numel() + 8
        return out

    apart, r = {name: far(t) for name, t in args.items()}, rows_of(case, 2)[0]
    assert torch.equal(pair_norms(**apart, backend=backend), pair_norms(**args, backend=backend))
    assert torch.equal(product(far(r), apart, backend), product(r, args, backend))


@emulated_only
@pytest.mark.parametrize(
    "case",
    [Case(n=70, mask="holes", window=(40, 20)), Case(B=1, n=50, H=24, Hkv=8, dtype=torch.bfloat16)],
    ids=str,
)
def test_order_of_threads_is_nothing(case, emulated):
    args = pair_args(case)
    r, _ = rows_of(case, 2)
    forward = product(r, args, "cuda"), pair_norms(**args, backend="cuda")
    emulated.machine(reversed=True)
    assert torch.equal(forward[0], product(r, args, "cuda")) and torch.equal(
        forward[1], pair_norms(**args, backend="cuda")
    )


@emulated_only
@pytest.mark.parametrize("dtype", sweep([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str)
def test_every_tile(dtype, emulated):
    # less shared memory: one group of warps, then keys read again, last none
    case = Case(B=1, n=70, H=12, Hkv=12, dh=64, d=96, dtype=dtype)
    args, launches = pair_args(case), set()
    with pooled(factor("cuda")) as compare:
        for limit in (232_448, 166_912, 101_376, 65_536, 16_384):
            emulated.machine(shared_limit=limit)
            if not emulated.pair_tile(12, 12, 64, dtype.itemsize)[0]:
                with pytest.raises(ValueError, match="no tile of 12 heads of 64 fits"):
                    pair_norms(**args, backend="cuda")
                continue
            emulated.launches()
            check_step("cuda", rows_of(case, 8)[0], args, compare)
            _, (_, threads, size), _ = emulated.launches()
            assert size <= limit
            launches.add((threads, size))
    assert limit == 16_384 and len(launches) > 1


@emulated_only
def test_tf32_where_the_caller_allows_it(monkeypatch):
    monkeypatch.setattr("pyglobenc.backends.cuda._extension.allows_tf32", lambda: True)
    args = pair_args(Case(B=2, n=60, H=12, Hkv=12, dh=64, d=768))
    # tensor cores read the first 19 bits
    cut = args | {
        name: (args[name].contiguous().view(torch.int32) & -8192).view(torch.float32) for name in ("q", "k")
    }
    exact = pair_norms(**doubled(args), backend="reference")
    assert_as_good_as_torch(pair_norms(**args, backend="cuda"), exact, pair_norms(**cut, backend="reference"))


def test_globenc_of_a_model():
    model = build("bert").float().to(DEVICE)
    ids = torch.randint(5, 97, (3, 19), device=DEVICE)
    mask = torch.arange(19, device=DEVICE) < torch.tensor([[19], [12], [7]], device=DEVICE)
    out, expected = (
        GlobEnc(model, backend=name)(input_ids=ids, attention_mask=mask.long())
        for name in ("cuda", "reference")
    )
    # 3 layers of float32 on either side: a few thousand roundings of 2^-24 at most
    torch.testing.assert_close(out.scores, expected.scores, rtol=2.0**-12, atol=2.0**-16)
    torch.testing.assert_close(out.log_scale, expected.log_scale, rtol=2.0**-12, atol=2.0**-12)

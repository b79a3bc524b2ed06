"""Relevance through attention in CUDA C++: emulated where there is no GPU."""

import pytest
import torch
from models import build
from numerics import assert_as_good_as_torch
from pair_cases import doubled
from sweeps import slow
from test_kernels_relevance import (  # noqa: F401
    DEVICE,
    Case,
    check,
    layer,
    test_empty,
    test_is_as_good_as_torch,
    test_more_rows_than_a_pass_takes,
    test_offsets_beyond_32_bits,
    test_one_packed_sequence,
    test_packed_offsets_beyond_32_bits,
    test_refuses_other_dtypes,
    test_rows_are_those_of_the_map,
    test_strided,
    test_without_a_rollout,
)

from pyglobenc import TransformerAttribution
from pyglobenc.ops import relevance_attention, relevance_maps, relevance_rollout_step

EMULATED = not torch.cuda.is_available()


@pytest.fixture(autouse=EMULATED)
def kernels(emulated):
    return emulated


@pytest.fixture
def backend():
    return "cuda"


# heads of odd sizes and of each way through the sums, blocks of queries and keys and one more, queries that
# see no key, windows that end on the first row of a tile
MORE = [
    Case(B=1, H=1, n=129, dh=64, T=2),
    Case(B=1, H=1, n=65, dh=80, mask="holes", additive=True, normalize=True),
    Case(B=1, n=34, dh=5, window=(4, 11)),
    Case(n=33, window=(-1, 0), mask="left"),
    Case(B=1, H=1, n=100, window=(17, 33)),
    Case(B=1, H=1, n=19, dh=260),
]


@pytest.mark.parametrize("cases", [[MORE[i] for i in (1, 2, 3, 5)], slow(MORE)], ids=["some", "all"])
def test_more_shapes(cases, backend):
    check(backend, cases)


def test_padding_is_never_read(backend):
    args, r = layer(Case(n=40, mask="holes"))
    dirty = args | {
        name: args[name].masked_fill(~args["key_mask"][:, None, :, None], torch.nan) for name in "kv"
    }
    for op, given in (
        (relevance_attention, dict(r=r)),
        (relevance_rollout_step, dict(r=r)),
        (relevance_maps, {}),
    ):
        clean, out = (op(**some, **given, backend=backend) for some in (args, dirty))
        if op is relevance_attention:
            assert all(torch.equal(*pair) for pair in zip(clean, out, strict=True))
        else:
            assert torch.equal(clean, out)


@pytest.mark.parametrize("margin", [1, 4], ids=["copied by 4 bytes", "copied by 16 bytes"])
def test_nothing_around_the_tensors_is_read(margin, backend):
    args, r = layer(Case(n=37, dh=20, T=3, additive=True))

    def framed(t):
        if not isinstance(t, torch.Tensor):
            return t
        out = torch.full([size + 2 * margin for size in t.shape], torch.nan, device=DEVICE)[
            (slice(margin, -margin),) * t.dim()
        ]
        return out.copy_(t)

    plain = relevance_attention(**args, r=r, backend=backend)
    framed_out = relevance_attention(
        **{name: framed(t) for name, t in args.items()}, r=framed(r), backend=backend
    )
    assert all(torch.equal(*pair) for pair in zip(plain, framed_out, strict=True))


def test_transformer_attribution_of_a_model(backend):
    model = build("bert-classifier").float().to(DEVICE)
    ids = torch.randint(5, 97, (2, 19), device=DEVICE)
    mask = (torch.arange(19, device=DEVICE) < torch.tensor([[19], [11]], device=DEVICE)).long()
    out, expected = (
        TransformerAttribution(model, backend=name)(input_ids=ids, attention_mask=mask, start_layer=2)
        for name in (backend, "reference")
    )
    # the last layer alone: what comes below divides by scores near 0, and float32 results differ at will
    torch.testing.assert_close(out.scores, expected.scores, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not EMULATED, reason="sets the emulated machine's limits")
class TestMachine:
    def run(self, kernels, backend, args, r):
        kernels.launches()
        out = *relevance_attention(**args, r=r, backend=backend), relevance_maps(**args, backend=backend)
        return out, [threads for _, threads, _ in kernels.launches()]

    @pytest.mark.parametrize("kilobytes, threads", [(80, [64, 128, 64]), slow(65, [32, 64, 32])])
    def test_little_shared_memory(self, kilobytes, threads, kernels, backend):
        args, r = layer(Case(B=1, H=1, n=70, dh=64))
        expected, most = self.run(kernels, backend, args, r)
        kernels.machine(shared_limit=kilobytes * 1024, reversed=True)
        out, fewer = self.run(kernels, backend, args, r)
        assert (most, fewer) == ([128] * 3, threads)
        # neither how many warps share a block nor the order they run in changes anything
        assert all(torch.equal(*pair) for pair in zip(out, expected, strict=True))

    def test_refuses_heads_that_do_not_fit(self, kernels, backend):
        args, _ = layer(Case(n=5, dh=256))
        kernels.machine(shared_limit=99 * 1024)
        with pytest.raises(
            ValueError,
            match=f"heads of 256 take {kernels.relevance_shared(256)} bytes of shared memory, a block here "
            f"has",
        ):
            relevance_maps(**args, backend=backend)

    @pytest.mark.parametrize("dh", [64, 256])
    def test_heads_that_just_fit(self, dh, kernels, backend):
        args, r = layer(Case(B=1, H=1, n=5, dh=dh))
        kernels.machine(shared_limit=kernels.relevance_shared(dh))
        _, threads = self.run(kernels, backend, args, r)
        assert min(threads) == 32


@pytest.mark.gpu
class TestOnAGPU:
    CASE = Case(H=12, n=1000, dh=64, mask="left", additive=True, normalize=True)

    def test_bert_base_at_full_size(self, backend):
        check(backend, [self.CASE])

    def test_sums_over_many_keys(self, backend):
        args, _ = layer(Case(B=1, H=1, n=40_000))
        runs = ((args, backend), (doubled(args), "reference"), (args, "reference"))
        assert_as_good_as_torch(*(relevance_attention(**given, backend=name)[3] for given, name in runs))

    def test_runs_repeat_bit_for_bit(self, backend):
        args, r = layer(self.CASE)
        runs = [relevance_attention(**args, r=r, additive_mask=True, backend=backend) for _ in range(2)]
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))

    def test_memory_is_linear(self, backend):
        q, r = torch.randn(1, 12, 8192, 64, device=DEVICE), torch.rand(1, 1, 8192, device=DEVICE)
        lse = torch.full((1, 12, 8192), 12.0, device=DEVICE)
        relevance_attention(q, q, q, lse, q, q, r=r, backend=backend)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        relevance_attention(q, q, q, lse, q, q, r=r, backend=backend)
        # three results of 25 MB; the map of one head alone would take 268 MB
        assert torch.cuda.max_memory_allocated() - before < 80 * 2**20

"""Relevance through attention of the GPU backends against the reference: on the GPU where there is one, else
in Triton's interpreter.

The CUDA backend takes these tests over in cuda/test_relevance.py.
"""

import mmap
from dataclasses import dataclass

import pytest
import torch
from numerics import pooled
from pair_cases import doubled, key_mask, spread_all
from sweeps import slow, sweep

from pyglobenc.kernels.relevance_attention import MAX_ROWS
from pyglobenc.ops import relevance_attention, relevance_maps, relevance_rollout_step
from pyglobenc.ops.attention import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """Shape of a layer, what hides keys from its queries, and which variant of the rules."""

    B: int = 2
    H: int = 2
    n: int = 33
    dh: int = 16
    T: int = 1
    mask: str = "none"
    window: tuple[int, int] = (-1, -1)
    grad: bool = True
    additive: bool = False
    normalize: bool = False
    stabilizer: float = 0.0
    lengths: tuple[int, ...] = ()  # of sequences packed into one, in the place of n


CASES = [
    Case(B=5, n=1),
    Case(n=32, H=1, T=2),
    Case(B=1, n=49, dh=24, additive=True, normalize=True),
    Case(n=45, dh=32, T=3, mask="holes", additive=True),
    Case(n=50, mask="left", grad=False, normalize=True),
    Case(n=50, window=(-1, 0), T=2, normalize=True),
    # queries before the first real token see no key: their lse is inf
    Case(n=50, window=(-1, 0), mask="left", additive=True),
    Case(B=1, n=70, window=(17, 9), mask="holes", stabilizer=1e-3),
    Case(B=1, n=19, dh=256),
]
# Without a gradient: the third of the packed cases.
FEW = [CASES[i] for i in (0, 2, 3, 6, 7)]

# of one token, of one length side by side, a tile's queries and keys and one more or less
PACKED = [
    Case(B=1, H=8, T=8, lengths=(1, 1, 2, 1), additive=True, normalize=True),
    Case(B=1, H=2, lengths=(7, 7, 33, 5, 5), additive=True, normalize=True),
    Case(B=1, dh=24, T=3, lengths=(34, 31, 3), grad=False, normalize=True),
    Case(B=1, H=1, lengths=(16, 50, 17), window=(6, 3), stabilizer=1e-3),
]


@pytest.fixture
def backend():
    return "triton"


def layer(case: Case) -> tuple[dict, torch.Tensor]:
    """Arguments that the three ops share, and rows of the rollout.

    Queries and keys are halves of small integers, so that scores are exact, many of them 0: the division by a
    score that nearly cancels amplifies rounding without bound, in torch as in the kernel, and two draws of
    such errors don't compare.
    """
    n = sum(case.lengths) or case.n
    shape = (case.B, n, case.H, case.dh)
    q, k = ((torch.randn(shape) * 2).round().transpose(1, 2).to(DEVICE) / 2 for _ in range(2))
    v, s, grad = (torch.randn(shape).transpose(1, 2).to(DEVICE) for _ in range(3))
    mask = key_mask(case.mask, case.B, n)
    seen = dict(key_mask=mask if mask is None else mask.to(DEVICE), scaling=case.dh**-0.5, window=case.window)
    if case.lengths:
        # nothing cancels: in a short sequence few pairs make the additive mask's factor, and its largest
        # error
        q, k, v, s = q.abs() + 0.5, k.abs() + 0.5, v.abs(), s.abs()
        q[:, :, ::3] = 0  # scores of 0 are what the factor makes up for
        seen["cu_seqlens"] = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32)
    _, lse = attention(q.double(), k.double(), v.double(), **seen)
    args = dict(q=q, k=k, v=v, lse=lse.float(), grad_o=grad if case.grad else None, s=s, **seen)
    return args, torch.rand(case.B, case.T, n, device=DEVICE)


def compared(compare, backend, op, args: dict, tensors: dict, **options):
    """The error rule for every result of an op; compare: of `pooled`."""
    results = []
    for name, given in (
        (backend, tensors | args),
        ("reference", doubled(tensors | args)),
        ("reference", tensors | args),
    ):
        out = op(**given, **options, backend=name)
        results.append((out,) if isinstance(out, torch.Tensor) else out)
    for out, exact, torch_out in zip(*results, strict=True):
        assert (out is None) == (exact is None)
        if out is not None:
            compare(out, exact, torch_out)


def check(backend, cases: list[Case]) -> None:
    """The error rule for all results of the three ops in these cases; packed sequences have no maps."""
    with pooled() as compare:
        for case in cases:
            args, r = layer(case)
            options = dict(additive_mask=case.additive, normalize=case.normalize, stabilizer=case.stabilizer)
            compared(compare, backend, relevance_attention, args, dict(r=r), **options)
            compared(compare, backend, relevance_rollout_step, args, dict(r=r), normalize=case.normalize)
            if not case.lengths:
                compared(compare, backend, relevance_maps, args, {})


@pytest.mark.parametrize(
    "cases",
    [FEW, PACKED, slow([case for case in CASES if case not in FEW])],
    ids=["some", "packed", "rest"],
)
def test_is_as_good_as_torch(cases, backend):
    check(backend, cases)


@pytest.mark.parametrize("case", sweep(CASES, FEW[1:4]), ids=str)
def test_rows_are_those_of_the_map(case, backend):
    args, _ = layer(case)
    rows = torch.randint(0, case.n, (case.B, 20), device=DEVICE)
    every = relevance_maps(**args, backend=backend)
    assert torch.equal(
        relevance_maps(**args, rows=rows, backend=backend),
        every.gather(1, rows[..., None].expand(-1, -1, case.n)),
    )


def test_one_packed_sequence(backend):
    args, r = layer(Case(B=1, lengths=(1,)))
    packed = relevance_attention(**args, r=r, backend=backend)
    del args["cu_seqlens"]
    assert all(
        torch.equal(*pair)
        for pair in zip(packed, relevance_attention(**args, r=r, backend=backend), strict=True)
    )


def test_without_a_rollout(backend):
    args, r = layer(Case())
    out = relevance_attention(**args, backend=backend)
    assert out[4] is None
    assert all(
        torch.equal(*pair)
        for pair in zip(out[:4], relevance_attention(**args, r=r, backend=backend)[:4], strict=True)
    )


def test_more_rows_than_a_pass_takes(backend):
    args, r = layer(Case(B=1, T=MAX_ROWS + 1))
    runs = ((args, r, backend), (doubled(args), r.double(), "reference"), (args, r, "reference"))
    with pooled() as compare:
        compare(*(relevance_attention(**given, r=rows, backend=name)[4] for given, rows, name in runs))


def test_strided(backend):
    args, r = layer(Case(mask="holes"))
    strided = spread_all(args)
    out = relevance_attention(**strided, r=r.mT.contiguous().mT, backend=backend)
    for mine, expected in zip(out, relevance_attention(**args, r=r, backend=backend), strict=True):
        assert torch.equal(mine, expected)


def far_memory() -> torch.Tensor:
    """2^31 floats and some; on the CPU only those written take memory."""
    count = 2**31 + 2**16
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < 5 * count:
            pytest.skip("needs 10 GB of free GPU memory")
        return torch.empty(count, device=DEVICE)
    # 0x4000: Linux's MAP_NORESERVE, which Python names from 3.12 on
    return torch.frombuffer(
        mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000), dtype=torch.float32
    )


def far_apart(tensors: dict, axis: int) -> dict:
    """Floating-point tensors with the first and last entry along the axis 2^31 floats apart."""
    memory, used, out = far_memory(), 0, dict(tensors)
    for name, t in tensors.items():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            rest = [1 if at == axis else size for at, size in enumerate(t.shape)]
            steps = list(torch.empty(rest).stride())
            steps[axis] = 2**31 // (t.shape[axis] - 1)
            out[name] = memory.as_strided(t.shape, steps, used).copy_(t)
            used += t.numel() // t.shape[axis]
    return out


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(axis, backend):
    args, r = layer(Case(n=9, T=2))
    apart = far_apart(args | dict(r=r), axis)
    out, plain = (relevance_attention(**given, backend=backend) for given in (apart, args | dict(r=r)))
    assert all(torch.equal(*pair) for pair in zip(out, plain, strict=True))
    del apart["r"]
    out, plain = (relevance_maps(**given, backend=backend) for given in (apart, args))
    assert torch.equal(out, plain)


def test_packed_offsets_beyond_32_bits(backend):
    args, r = layer(Case(B=1, lengths=(4, 4, 1), T=2))
    out, plain = (
        relevance_attention(**given, backend=backend)
        for given in (far_apart(args | dict(r=r), 2), args | dict(r=r))
    )
    assert all(torch.equal(*pair) for pair in zip(out, plain, strict=True))


@pytest.mark.parametrize("B, n, T", [(0, 4, 1), (2, 0, 1), (2, 4, 0)])
def test_empty(B, n, T, backend):
    q, r = torch.zeros(B, 2, n, 16, device=DEVICE), torch.zeros(B, T, n, device=DEVICE)
    out = relevance_attention(q, q, q, q[..., 0], q, q, r=r, backend=backend)
    assert [t.shape for t in out] == [q.shape] * 3 + [(B, n), (B, T, n)]
    assert relevance_maps(q, q, q, q[..., 0], q, q, backend=backend).shape == (B, n, n)
    assert relevance_rollout_step(r, q, q, q, q[..., 0], q, q, backend=backend).shape == (B, T, n)


def test_refuses_other_dtypes(backend):
    args, _ = layer(Case(n=5))
    with pytest.raises(ValueError, match="computes in float32, got q torch.float64"):
        relevance_maps(**doubled(args), backend=backend)


def test_refuses_wide_heads():
    args, _ = layer(Case(n=5, dh=257))
    with pytest.raises(ValueError, match="takes heads of up to 256, got 257"):
        relevance_maps(**args, backend="triton")

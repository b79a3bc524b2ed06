"""Elementwise relevance rules of the GPU backends against the reference: on the GPU where there is one, else
Triton's interpreter.

The CUDA backend takes these tests over in cuda/test_rules.py.
"""

from types import SimpleNamespace

import pytest
import torch
from numerics import pooled, until_enough

from pyglobenc.backends.dispatch import reasons
from pyglobenc.common.deferred import checks_put_off
from pyglobenc.kernels import _device
from pyglobenc.ops import add_relevance, clone_relevance, linear_relevance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def backend():
    return "triton"


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def check(backend, op, draw, **options):
    """The error rule for every result of an op that takes by name the float32 tensors that draw() returns;
    the last results.
    """
    for compare in until_enough():
        out = check_with(compare, backend, op, draw(), **options)
    return out


def check_with(compare, backend, op, tensors, **options):
    """The error rule for every result of an op for these tensors, and the results."""
    doubled = {
        name: [p.double() for p in t] if isinstance(t, list) else t.double() for name, t in tensors.items()
    }
    out, exact, torch_out = (
        op(**given, **options, backend=name)
        for given, name in ((tensors, backend), (doubled, "reference"), (tensors, "reference"))
    )
    for results in zip(
        *((t,) if isinstance(t, torch.Tensor) else t for t in (out, exact, torch_out)), strict=True
    ):
        compare(*results)
    return out


# the first three together have enough numbers for the error rule
SHAPES = [(3, 1, 1), (5, 7, 13), (2, 5, 61), (3, 11, 768)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_clone(count, backend):
    with pooled() as compare:
        for shape in SHAPES:
            args = dict(parts=[random(*shape) for _ in range(count)], x=random(*shape))
            check_with(compare, backend, clone_relevance, args)


def test_clone_guard(backend):
    x = torch.tensor([0.0, -0.0, -1e-9, 1e-9, -2e-9, 1e-20, -1e-20, 3.0], device=DEVICE).expand(2, 70, 8)
    out = check(backend, clone_relevance, lambda: dict(parts=[random(2, 70, 8)], x=x))
    assert not out[..., :2].any()


@pytest.mark.parametrize("options", [{}, dict(rescale=False), dict(stabilizer=1e-3)], ids=str)
def test_add(options, backend):
    # sums and quotients whose terms don't cancel: with random signs both errors are those of a few pairs near
    # 0
    with pooled() as compare:
        for shape in SHAPES:
            args = {name: random(*shape).abs() + 0.1 for name in "rab"}
            check_with(compare, backend, add_relevance, args, **options)


def test_add_of_both_signs_is_the_reference(backend):
    shape = (2, 37, 96)
    r, a, b = random(*shape), random(*shape), random(*shape)
    b[0, :5] = -a[0, :5]
    for out, expected in zip(
        add_relevance(r, a, b, backend=backend), add_relevance(r, a, b, backend="reference"), strict=True
    ):
        # the same operations on the same float32 numbers: only the float64 sums run in another order, and
        # they cancel about 1e4 fold
        torch.testing.assert_close(out, expected, rtol=4 * 2.0**-24, atol=0)
        assert not out[0, :5].any()


def test_add_of_more_blocks_than_a_glance(backend):
    from pyglobenc.kernels.add_relevance import BLOCK, MAX_BLOCKS

    if DEVICE == "cpu":
        shape, most = (1, 5, BLOCK - 3), 2
    else:
        shape, most = (1, MAX_BLOCKS + 7, 2 * BLOCK - 3), MAX_BLOCKS

    def draw():
        return {name: random(*shape).abs() + 0.1 for name in "rab"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyglobenc.kernels.add_relevance.MAX_BLOCKS", most)
        check(backend, add_relevance, draw)
        check(backend, add_relevance, draw, cu_seqlens=torch.tensor([0, 1, shape[1]], dtype=torch.int32))


@pytest.mark.parametrize("options", [{}, dict(rescale=False), dict(stabilizer=1e-3)], ids=str)
@pytest.mark.parametrize(
    "lengths, d", [((1, 1, 2, 1), 260), ((7, 7, 33, 5, 5, 5, 18), 70), ((400, 1), 1)], ids=str
)
def test_add_packed(lengths, d, options, backend):
    # sums of R_a and R_b of two signs, or they would need no rescaling; each sequence's by a factor of its
    # own
    part = torch.linspace(0.1, 0.9, len(lengths)).repeat_interleave(torch.tensor(lengths))[:, None].to(DEVICE)

    def draw():
        r, a, b = (random(1, sum(lengths), d).abs() + 0.1 for _ in range(3))
        return dict(r=r, a=a + b, b=-part * b)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    check(backend, add_relevance, draw, **options, cu_seqlens=cu_seqlens)


def linear(batch, n, d_in, d_out):
    weight = random(d_out, d_in) / d_in**0.5
    return dict(r=random(batch, n, d_out), x=random(batch, n, d_in), weight=weight)


@pytest.mark.parametrize("given", [False, True], ids=["computed", "forward"])
def test_linear(given, backend):
    with pooled() as compare:
        for shape in ((3, 1, 1, 1), (10, 7, 13, 5), (1, 9, 12, 7), (2, 19, 96, 130)):
            args = linear(*shape)
            if shape[2] == 1:
                args["x"], args["weight"] = args["x"].abs(), args["weight"].abs()
            if given:
                bias, output = random(shape[3]), args["x"] @ args["weight"].T
                args |= dict(abs_weight=args["weight"].abs(), bias=bias, output=output + bias)
            check_with(compare, backend, linear_relevance, args)


def test_linear_is_recorded_as_it_runs(backend):
    args = linear(2, 3, 10, 7)
    with checks_put_off():
        recorded = linear_relevance(**args, backend=backend)
    assert torch.equal(recorded, linear_relevance(**args, backend=backend))


@pytest.mark.parametrize("part", [0.002, 0.5, 1.0], ids=["few", "many", "all"])
def test_linear_with_nearly_dead_outputs(part, backend):
    args = linear(2, 8, 64, 20)
    x, weight = args["x"].abs() + 0.1, -args["weight"].abs() - 0.01
    dead = torch.rand(20, device=DEVICE) < part
    dead[3] = True
    # one contribution of many is positive, and tiny
    weight[~dead] = -weight[~dead]
    weight[dead, 0] = 1e-5
    out = check(backend, linear_relevance, lambda: args | dict(x=x, weight=weight))
    assert out[..., 0].abs().min() > 0


@pytest.mark.parametrize("form", ["plain", "turned", "half"])
def test_linear_with_outputs_dead_for_one_token(form, backend):
    """Among more columns than a program or warp takes; the other tokens have none, and nothing else of that
    one is.
    """
    args = linear(2, 2, 270, 515)
    dead = torch.tensor([3, 127, 128, 300, 514], device=DEVICE)
    args["x"][0, 1] = args["x"][0, 1].abs() + 0.1
    args["weight"][dead] = -args["weight"][dead].abs() - 0.01
    args["weight"][dead, 0] = args["weight"][dead, -1] = 1e-3
    args["r"][0, 1, 300] = 0
    args["weight"] = {"turned": lambda t: t.T.contiguous().T, "half": torch.Tensor.bfloat16}.get(
        form, torch.clone
    )(args["weight"])
    check(backend, linear_relevance, lambda: args)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)], ids=str)
def test_empty(shape, backend):
    t = torch.zeros(shape, device=DEVICE)
    weight = torch.zeros(6, 4, device=DEVICE)
    assert clone_relevance([t, t], t, backend=backend).shape == shape
    assert [out.shape for out in add_relevance(t, t, t, backend=backend)] == [shape, shape]
    assert linear_relevance(t.new_zeros(*shape[:2], 6), t, weight, backend=backend).shape == shape


def test_strided(backend):
    r, a, b = (random(2, 9, 14, 2)[..., 0] for _ in range(3))
    assert not a.is_contiguous()
    assert torch.equal(
        clone_relevance([r, a], b, backend=backend), clone_relevance([r, a], b, backend="reference")
    )
    plain = add_relevance(r.contiguous(), a.contiguous(), b.contiguous(), backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(add_relevance(r, a, b, backend=backend), plain, strict=True))


def test_refuses_with_reasons(backend):
    t = random(1, 2, 3)
    with pytest.raises(ValueError, match="takes up to 4 parts, got 5"):
        clone_relevance([t] * 5, t, backend=backend)
    with pytest.raises(ValueError, match="computes in float32, got r torch.float64"):
        add_relevance(t.double(), t.double(), t.double(), backend=backend)
    # not by the op: torch would only compute its shape
    (reason,) = reasons(
        "linear_relevance", backend, (t, t, random(3, 3), None, t, torch.zeros(3, device="meta"))
    )
    assert reason.startswith("tensors are on several devices: x ") and reason.endswith("bias meta")


@pytest.mark.parametrize(
    "capability, problem, expected",
    [
        ((9, 0), None, []),
        ((7, 5), None, ["needs compute capability 8.0 or later"]),
        ((9, 0), "Failed to find C compiler", ["Triton doesn't start: Failed to find C compiler"]),
    ],
)
def test_reasons_of_a_gpu(capability, problem, expected, monkeypatch):
    monkeypatch.setattr(_device, "interpreting", lambda: False)
    monkeypatch.setattr(_device, "driver_problem", lambda: problem)
    monkeypatch.setattr(_device, "capability", lambda device: capability)
    assert _device.device_reasons({"x": SimpleNamespace(device=torch.device("cuda:0"))}) == expected


def test_triton_starts_where_there_is_a_gpu():
    assert (_device.driver_problem() is None) == (DEVICE == "cuda")

"""Ops `relevance_maps` and `relevance_rollout_step` against materialised arrays and against the pass of `relevance_attention`."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyglobenc.ops import attention, relevance_attention, relevance_maps, relevance_rollout_step

SIZES = [1, 7, 64, 65]


def inputs(n, dtype=torch.float64, pads=0, heads=3, dh=8):
    q, k, v, grad_o, s = (torch.randn(2, heads, n, dh, dtype=dtype) for _ in range(5))
    mask = None
    if pads:
        mask = torch.ones(2, n, dtype=torch.bool)
        mask[1, n - pads :] = False
    _, lse = attention(q, k, v, key_mask=mask)
    return dict(q=q, k=k, v=v, lse=lse, grad_o=grad_o, s=s), mask


def exact_map(t, mask):
    """mean_h max(<grad_o, v> R_alpha, 0), materialised."""
    scores = t["q"] @ t["k"].transpose(2, 3) * t["q"].shape[3] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    values = t["v"].transpose(2, 3)
    relevance = scores.softmax(-1) * (t["s"] @ values) / 2
    weighted = relevance if t["grad_o"] is None else relevance * (t["grad_o"] @ values)
    return weighted.clamp(min=0).mean(1)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("n", SIZES)
def test_maps(n, pads, gradient):
    t, mask = inputs(n, pads=min(pads, n - 1))
    t = t if gradient else t | dict(grad_o=None)
    exact = exact_map(t, mask)
    out = relevance_maps(**t, key_mask=mask, backend="reference")
    assert (out - exact).abs().max() <= 1e-12 * exact.abs().max()
    rows = torch.randint(n, (2, 2))
    some = relevance_maps(**t, key_mask=mask, rows=rows, backend="reference")
    assert (some - exact.gather(1, rows[..., None].expand(-1, -1, n))).abs().max() <= 1e-12 * exact.abs().max()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("n", SIZES)
def test_rollout_step(n, pads, normalize):
    t, mask = inputs(n, pads=min(pads, n - 1))
    matrix = torch.eye(n, dtype=torch.float64) + exact_map(t, mask)
    if normalize:
        matrix = matrix / matrix.sum(-1, keepdim=True)
    r = torch.rand(2, 3, n, dtype=torch.float64)
    out = relevance_rollout_step(r, **t, key_mask=mask, normalize=normalize, backend="reference")
    assert (out - r @ matrix).abs().max() <= 1e-12 * (r @ matrix).abs().max()
    *_, row_sums, rolled = relevance_attention(**t, r=r, key_mask=mask, normalize=normalize, backend="reference")
    assert torch.equal(rolled, out)
    sums = exact_map(t, mask).sum(-1)
    assert (row_sums - sums).abs().max() <= 1e-12 * sums.abs().max()


def test_strided_input():
    t, _ = inputs(9)
    strided = {name: value.transpose(1, 2).contiguous().transpose(1, 2) if value.dim() == 4 else value for name, value in t.items()}
    exact = exact_map(t, None)
    assert (relevance_maps(**strided) - exact).abs().max() <= 1e-12 * exact.abs().max()


def test_fake_tensors_have_the_results_shapes():
    t, _ = inputs(9)
    r = torch.rand(2, 3, 9, dtype=torch.float64)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in t.items()}
        assert relevance_maps(**fake).shape == (2, 9, 9)
        assert relevance_rollout_step(mode.from_tensor(r), **fake).shape == (2, 3, 9)


def test_refusals():
    t, _ = inputs(9)
    r = torch.rand(2, 3, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="relevance_maps: v must be"):
        relevance_maps(**(t | dict(v=t["v"][:, :, :5])))
    with pytest.raises(TypeError, match="must have one dtype"):
        relevance_maps(**(t | dict(s=t["s"].float())))
    with pytest.raises(ValueError, match="rows must lie in"):
        relevance_maps(**t, rows=torch.tensor([[9], [0]]))
    with pytest.raises(TypeError, match="rows must be int64"):
        relevance_maps(**t, rows=torch.tensor([[1], [0]], dtype=torch.int32))
    with pytest.raises(ValueError, match="relevance_rollout_step: r must be"):
        relevance_rollout_step(r[:, :, :4], **t)
    with pytest.raises(TypeError, match="float32 or float64"):
        relevance_maps(**{name: value.half() for name, value in t.items()})

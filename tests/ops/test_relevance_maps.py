import pytest
import torch
from relevance_cases import exact_map, inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from pyglobenc.ops import relevance_maps

SIZES = [1, 7, 64, 65]


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
    assert (
        some - exact.gather(1, rows[..., None].expand(-1, -1, n))
    ).abs().max() <= 1e-12 * exact.abs().max()


def test_strided_input():
    t, _ = inputs(9)
    strided = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2) if value.dim() == 4 else value
        for name, value in t.items()
    }
    exact = exact_map(t, None)
    assert (relevance_maps(**strided) - exact).abs().max() <= 1e-12 * exact.abs().max()


def test_fake_tensors_have_the_result_s_shape():
    t, _ = inputs(9)
    with FakeTensorMode() as mode:
        assert relevance_maps(**{name: mode.from_tensor(value) for name, value in t.items()}).shape == (
            2,
            9,
            9,
        )


def test_refusals():
    t, _ = inputs(9)
    with pytest.raises(ValueError, match="relevance_maps: v must be"):
        relevance_maps(**(t | dict(v=t["v"][:, :, :5])))
    with pytest.raises(TypeError, match="must have one dtype"):
        relevance_maps(**(t | dict(s=t["s"].float())))
    with pytest.raises(ValueError, match="rows must lie in"):
        relevance_maps(**t, rows=torch.tensor([[9], [0]]))
    with pytest.raises(TypeError, match="rows must be int64"):
        relevance_maps(**t, rows=torch.tensor([[1], [0]], dtype=torch.int32))
    with pytest.raises(TypeError, match="float32 or float64"):
        relevance_maps(**{name: value.half() for name, value in t.items()})

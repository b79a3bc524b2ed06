import pytest
import torch
from relevance_cases import exact_map, inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from pyglobenc.ops import relevance_attention, relevance_rollout_step

SIZES = [1, 7, 64, 65]


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
    *_, row_sums, rolled = relevance_attention(
        **t, r=r, key_mask=mask, normalize=normalize, backend="reference"
    )
    assert torch.equal(rolled, out)
    sums = exact_map(t, mask).sum(-1)
    assert (row_sums - sums).abs().max() <= 1e-12 * sums.abs().max()


def test_fake_tensors_have_the_result_s_shape():
    t, _ = inputs(9)
    r = torch.rand(2, 3, 9, dtype=torch.float64)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in t.items()}
        assert relevance_rollout_step(mode.from_tensor(r), **fake).shape == (2, 3, 9)


def test_refusals():
    t, _ = inputs(9)
    r = torch.rand(2, 3, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="relevance_rollout_step: r must be"):
        relevance_rollout_step(r[:, :, :4], **t)
    with pytest.raises(TypeError, match="must have one dtype"):
        relevance_rollout_step(r.float(), **t)

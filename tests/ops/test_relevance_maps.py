import pytest
import torch
from pair_cases import Case, spread_all
from relevance_cases import exact_map, inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from pyglobenc.ops import relevance_maps


def test_strided_input():
    t = inputs(Case(n=9), torch.float64)
    torch.testing.assert_close(relevance_maps(**spread_all(t)), exact_map(t)[2])


def test_fake_tensors_have_the_result_s_shape():
    t = inputs(Case(n=9))
    with FakeTensorMode() as mode:
        out = relevance_maps(*(mode.from_tensor(t[name]) for name in ("q", "k", "v", "lse", "grad_o", "s")))
    assert out.shape == (2, 9, 9)


def test_refusals():
    t = inputs(Case(n=9), torch.float64)
    half = {name: value.half() for name, value in t.items() if isinstance(value, torch.Tensor)}
    for wrong, error, message in [
        (dict(v=t["v"][:, :, :5]), ValueError, "relevance_maps: v must be"),
        (dict(s=t["s"].float()), TypeError, "must have one dtype"),
        (dict(rows=torch.tensor([[9], [0]])), ValueError, "rows must lie in"),
        (dict(rows=torch.tensor([[1], [0]], dtype=torch.int32)), TypeError, "rows must be int64"),
        (half, TypeError, "float32 or float64"),
    ]:
        with pytest.raises(error, match=message):
            relevance_maps(**t | wrong)

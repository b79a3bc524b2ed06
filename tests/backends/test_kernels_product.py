"""`relevance_product` of the GPU backends: on the GPU where there is one, else in Triton's interpreter.

The CUDA backend takes these tests over in cuda/test_product.py.
"""

import pytest
import torch
from pair_cases import spread_all
from product_cases import CASES, DEVICE, Case, check, layer, rows
from sweeps import in_parts

from pyglobenc.ops import relevance_product


@pytest.fixture
def backend():
    return "triton"


@pytest.mark.parametrize("cases", in_parts(CASES, [CASES[i] for i in (0, 1, 2, 6, 8)]))
def test_is_as_good_as_torch(cases, backend):
    check(backend, cases)


def test_padding_is_never_read(backend):
    case = Case(n=20, m=40, mask="holes")
    args = layer(case)
    hidden = ~args["key_mask"][:, None, :, None]
    dirty = args | {name: args[name].masked_fill(hidden, torch.nan) for name in "kv"}
    for transposed in (False, True):
        r = rows(case, transposed)
        clean, out = (
            relevance_product(r, **given, transposed=transposed, backend=backend) for given in (args, dirty)
        )
        assert torch.equal(clean, out)


def test_strided(backend):
    case = Case(n=20, m=33, mask="right")
    args = layer(case)
    for transposed in (False, True):
        r = rows(case, transposed)
        strided = relevance_product(r, **spread_all(args), transposed=transposed, backend=backend)
        assert torch.equal(strided, relevance_product(r, **args, transposed=transposed, backend=backend))


@pytest.mark.parametrize("B, n, m, T", [(0, 4, 3, 1), (2, 0, 3, 1), (2, 4, 0, 1), (2, 4, 3, 0)])
def test_empty(B, n, m, T, backend):
    q, k = torch.zeros(B, 2, n, 16, device=DEVICE), torch.zeros(B, 2, m, 16, device=DEVICE)
    for name in (backend, "reference"):
        out = relevance_product(torch.zeros(B, T, n, device=DEVICE), q, k, k, q[..., 0], q, backend=name)
        assert torch.equal(out, torch.zeros(B, T, m, device=DEVICE))
        r = torch.zeros(B, T, m, device=DEVICE)
        out = relevance_product(r, q, k, k, q[..., 0], q, transposed=True, backend=name)
        assert torch.equal(out, torch.zeros(B, T, n, device=DEVICE))

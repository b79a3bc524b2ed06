"""`relevance_product` equals products with the stored map, with as many keys as queries or not."""

import pytest
import torch
from pair_cases import KERNELS, running
from product_cases import CASES, DEVICE, Case, check, layer, probabilities, rows
from torch._subclasses.fake_tensor import FakeTensorMode

from pyglobenc.backends.shared.score_mods import SoftCap, StoredBias
from pyglobenc.ops import relevance_product


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_stored_map(case, transposed):
    for mod in (None, SoftCap(2.0), StoredBias(torch.randn(1, case.H, case.n, case.m).double().to(DEVICE))):
        args = layer(case, torch.float64, score_mod=mod)
        alpha, _ = probabilities(args)
        v = args["v"].repeat_interleave(case.H // case.Hkv, 1)
        a = (alpha * (args["grad_o"] @ v.mT)).clamp(min=0).mean(1)
        r = rows(case, transposed, torch.float64)
        out = relevance_product(r, **args, transposed=transposed, backend="reference")
        exact = r @ (a.mT if transposed else a)
        assert out.shape == exact.shape
        assert (out - exact).abs().max() <= 1e-13 * max(exact.abs().max(), a.abs().max())


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_cpu_is_as_good_as_torch(kernel):
    with running(kernel) as backend:
        check(backend, CASES)


def test_fake_tensors_have_the_result_s_shape():
    args = layer(Case(n=9, m=5))
    with FakeTensorMode() as mode:
        t = {name: mode.from_tensor(args[name].cpu()) for name in ("q", "k", "v", "lse", "grad_o")}
        assert relevance_product(torch.empty(2, 3, 9), **t).shape == (2, 3, 5)
        assert relevance_product(torch.empty(2, 3, 5), **t, transposed=True).shape == (2, 3, 9)


def test_refusals():
    args, r = layer(Case(n=9, m=5)), torch.rand(2, 3, 9, device=DEVICE)
    for changes, message in (
        (dict(transposed=True), "r must be"),
        (dict(window=(-1, 0)), "a window needs as many keys as queries, got 5 keys, 9 queries"),
        (dict(grad_o=args["grad_o"][:, :, :4]), "grad_o must be"),
        (dict(k=args["k"].double()), "must have one dtype"),
        (dict(key_mask=torch.ones(2, 9, dtype=torch.bool)), "key_mask must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"relevance_product: .*{message}"):
            relevance_product(r, **args | changes)

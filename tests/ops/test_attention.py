from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from allocations import measure_allocations
from direct import attention_probabilities
from numerics import assert_as_good_as_torch, until_enough
from pair_cases import key_mask

from pyglobenc.backends.reference.attention import attention as reference_attention
from pyglobenc.backends.shared.score_mods import DisentangledBias, RelativeBias, SoftCap, StoredBias
from pyglobenc.ops import attention

WINDOWS = [(-1, -1), (-1, 0), (3, 0), (5, 5), (0, 2), (-1, 4), (64, 64)]
SIZES = [(2, 4, 4, 33, 8), (1, 6, 2, 130, 16), (2, 2, 1, 1, 4)]


def tensors(B, H, Hkv, n, dh, dtype=torch.float64):
    return [torch.randn(B, heads, n, dh, dtype=dtype) for heads in (H, Hkv, Hkv)]


def dense(q, k, v, mask, scaling, window, bias=None, cap=None):
    """o and lse from (n, n) scores."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(2, 3) * scaling
    scores = scores if bias is None else scores + bias
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    n = q.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    hidden = ((j < i - window[0]) & (window[0] >= 0)) | ((j > i + window[1]) & (window[1] >= 0))
    if mask is not None:
        hidden = hidden | ~mask[:, None, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    blind = lse == -torch.inf
    return (scores.softmax(-1).nan_to_num(0) @ v), lse.masked_fill(blind, torch.inf)


@pytest.mark.parametrize("kind", ["none", "right", "left", "holes", "single"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_dense(size, window, kind):
    q, k, v = tensors(*size)
    mask = key_mask(kind, size[0], size[3])
    o, lse = attention(q, k, v, key_mask=mask, scaling=0.3, window=window)
    exact_o, exact_lse = dense(q, k, v, mask, 0.3, window)
    torch.testing.assert_close(o, exact_o, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-13)
    probabilities = attention_probabilities(q, k, mask, 0.3, window)
    torch.testing.assert_close(
        o, probabilities @ v.repeat_interleave(size[1] // size[2], dim=1), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(-1, 0), (7, 7)])
def test_as_good_as_torch(window, dtype):
    for compare in until_enough():
        q, k, v = tensors(2, 4, 2, 97, 16, dtype)
        mask = key_mask("left", 2, 97)
        o, lse = attention(q, k, v, key_mask=mask, window=window)
        exact, exact_lse = attention(q.double(), k.double(), v.double(), key_mask=mask, window=window)
        plain, plain_lse = reference_attention(q.float(), k.float(), v.float(), mask, 0.25, window)
        seen = torch.isfinite(exact_lse)
        compare(o[seen], exact[seen], plain[seen].to(dtype))
        assert torch.equal(torch.isfinite(lse), seen)
        if dtype == torch.float32:
            compare(lse[seen], exact_lse[seen], plain_lse[seen])


@pytest.mark.parametrize("window", [(-1, 0), (4, 4)])
def test_gradients(window):
    q, k, v = (t.requires_grad_() for t in tensors(2, 2, 2, 20, 8))
    mask = key_mask("left", 2, 20)
    weights = torch.randn(2, 2, 20, 8, dtype=torch.float64)
    found = torch.autograd.grad(
        (attention(q, k, v, key_mask=mask, window=window)[0] * weights).sum(), (q, k, v)
    )
    real = (dense(q, k, v, mask, 8**-0.5, window)[1] != torch.inf)[..., None]
    reference = reference_attention(q, k, v, mask, 8**-0.5, window)[0].masked_fill(~real, 0)
    for out, exact in zip(found, torch.autograd.grad((reference * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cap", "relative", "stored", "both"])
def test_long_texts_have_the_gradients_of_the_dense_form(name, monkeypatch):
    monkeypatch.setattr(import_module(reference_attention.__module__), "STORED", 0)
    q, k, v = (t.requires_grad_() for t in tensors(2, 3, 3, 70, 8))
    mask = key_mask("left", 2, 70)
    mod, bias = (SoftCap(3.0), None) if name == "cap" else biased(name, 2, 3, 70, 8)
    o, lse = attention(q, k, v, key_mask=mask, scaling=0.3, score_mod=mod)
    dense_bias = None if bias is None else bias(q, k)
    exact = dense(q, k, v, mask, 0.3, (-1, -1), dense_bias, 3.0 if name == "cap" else None)
    weights = torch.randn(2, 3, 70, 9, dtype=torch.float64)

    def gradients(o, lse):
        return torch.autograd.grad((torch.cat([o, lse[..., None]], 3) * weights).sum(), (q, k, v))

    for out, expected in zip(gradients(o, lse), gradients(*exact), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def biased(name, B, H, n, dh):
    """A score mod and the dense bias it stands for, of queries and keys."""
    i = torch.arange(n)
    ahead = i[None] - i[:, None] + n - 1
    if name == "relative":
        table = torch.randn(H, 2 * n - 1, dtype=torch.float64)
        return RelativeBias(table), lambda q, k: table[:, ahead]
    if name == "stored":
        bias = torch.randn(1, H, n, n, dtype=torch.float64)
        return StoredBias(bias), lambda q, k: bias
    buckets = (torch.arange(2 * n - 1) // 3).clamp(max=5)
    keys, queries = torch.randn(2, H, 6, dh, dtype=torch.float64)
    mod = DisentangledBias(keys, queries if name == "both" else None, buckets, 0.2)

    def bias(q, k):
        out = 0.2 * torch.einsum("bhid,hijd->bhij", q, keys[:, buckets[ahead]])
        return (
            out + 0.2 * torch.einsum("bhjd,hijd->bhij", k, queries[:, buckets[ahead]])
            if name == "both"
            else out
        )

    return mod, bias


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("name", ["relative", "stored", "content", "both"])
def test_biases(name, kind):
    q, k, v = tensors(2, 3, 3, 70, 8)
    mask = key_mask(kind, 2, 70)
    mod, bias = biased(name, 2, 3, 70, 8)
    o, lse = attention(q, k, v, key_mask=mask, scaling=0.3, score_mod=mod)
    exact_o, exact_lse = dense(q, k, v, mask, 0.3, (-1, -1), bias(q, k))
    torch.testing.assert_close(o, exact_o, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-13)
    scores = q @ k.transpose(2, 3) * 0.3
    own = mod.diagonal(torch.diagonal(scores, dim1=2, dim2=3), q, k)
    torch.testing.assert_close(
        own, torch.diagonal(scores + bias(q, k), dim1=2, dim2=3), rtol=1e-12, atol=1e-13
    )


def test_soft_cap():
    q, k, v = tensors(2, 4, 2, 70, 8)
    o, lse = attention(q, k, v, scaling=2.0, window=(6, 0), score_mod=SoftCap(3.0))
    exact_o, exact_lse = dense(q, k, v, None, 2.0, (6, 0), cap=3.0)
    torch.testing.assert_close(o, exact_o, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "options", [dict(window=(-1, 0)), dict(window=(16, 16)), dict(score_mod=SoftCap(3.0))]
)
def test_nothing_of_size_n_n(options):
    n = 1600
    q, k, v = tensors(1, 2, 2, n, 8, torch.float32)
    used = measure_allocations(lambda: attention(q, k, v, key_mask=torch.arange(n)[None] > 9, **options))
    assert used.largest <= n * n * 4 / 4


def unlike(t, steps):
    """Whether a kernel that reads rows in steps would refuse a tensor (B, H, m, ...)."""
    strides = [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    return t.data_ptr() % 16 or strides[-1] != 1 or any(stride % steps for stride in strides[:-1])


def on_a_cpu(q, k, v, bias, causal, scale, lse_steps):
    """What torch's kernels of a GPU return, lse with the columns that fill it up."""
    scores = q.float() @ k.float().transpose(2, 3) * scale
    scores = scores if bias is None else scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -q.shape[2] % lse_steps), value=torch.nan)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), lse, None, None


@pytest.fixture(params=[True, False], ids=["ampere", "turing"])
def stand_ins(request, monkeypatch):
    """In the place of torch's kernels of a GPU; they refuse what those do."""

    def flash(q, k, v, dropout, causal, *, scale):
        assert (
            request.param
            and q.dtype != torch.float32
            and q.shape[3] % 8 == 0
            and q.shape[3] <= 256
            and not dropout
        )
        return on_a_cpu(q, k, v, None, causal, scale, 1)

    def efficient(q, k, v, bias, with_lse, dropout, causal, *, scale):
        assert with_lse and not dropout and not any(unlike(t, 16 // t.element_size()) for t in (q, k, v))
        if bias is not None:
            assert bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2]) and not unlike(bias, 8)
        return on_a_cpu(q, k, v, bias, causal, scale, 32)

    kernels = dict(
        _scaled_dot_product_flash_attention=flash, _scaled_dot_product_efficient_attention=efficient
    )
    module = import_module("pyglobenc.ops.attention")
    monkeypatch.setattr(module, "aten", SimpleNamespace(**kernels))
    monkeypatch.setattr(module, "since_ampere", lambda device: request.param)
    monkeypatch.setattr(module, "fused_call", module.gpu_call)


@pytest.mark.parametrize(
    "kind, window",
    [("none", (-1, -1)), ("none", (-1, 0)), ("left", (-1, 0)), ("holes", (-1, -1)), ("none", (6, 3))],
)
@pytest.mark.parametrize("dh", [6, 12, 64, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calls_of_a_gpu(dtype, dh, kind, window, stand_ins):
    q, k, v = tensors(2, 2, 2, 37, dh, dtype)
    mask = key_mask(kind, 2, 37)
    o, lse = attention(q, k, v, key_mask=mask, window=window)
    exact_o, exact_lse = dense(q.float(), k.float(), v.float(), mask, dh**-0.5, window)
    torch.testing.assert_close(o, exact_o.to(dtype))
    torch.testing.assert_close(lse, exact_lse)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, window",
    [("none", (-1, -1)), ("none", (-1, 0)), ("left", (-1, 0)), ("holes", (-1, -1)), ("none", (6, 3))],
)
@pytest.mark.parametrize("dh", [12, 64, 136, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype, dh, kind, window):
    q, k, v = (t.to("cuda", dtype) for t in tensors(8, 4, 2, 97, dh))
    mask = key_mask(kind, 8, 97)
    if mask is not None:
        mask[0] = True
        mask = mask.cuda()
    o, lse = attention(q, k, v, key_mask=mask, window=window)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), key_mask=mask, window=window)
    plain, plain_lse = reference_attention(q.float(), k.float(), v.float(), mask, dh**-0.5, window)
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    # tensor cores cut their sums off, up to an ulp where float32's are rounded, up to half; probabilities are
    # rounded to half precision
    assert_as_good_as_torch(o[seen], exact[seen], plain[seen].to(dtype), 4.0)
    assert_as_good_as_torch(lse[seen], exact_lse[seen], plain_lse[seen], 4.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dh", [6, 64])
def test_gradients_on_a_gpu(dh):
    q, k, v = (t.to("cuda", torch.float32).requires_grad_() for t in tensors(2, 2, 2, 33, dh))
    mask = key_mask("left", 2, 33).cuda()
    weights, grads = torch.randn(2, 2, 33, dh, device="cuda"), []
    for t in ((q, k, v), (q.double(), k.double(), v.double())):
        o, _ = attention(*t, key_mask=mask)
        grads.append(torch.autograd.grad((o * weights).sum(), (q, k, v)))
    plain, _ = reference_attention(q, k, v, mask, dh**-0.5, (-1, -1))
    grads.append(torch.autograd.grad((plain * weights).sum(), (q, k, v)))
    for out, exact, torch_out in zip(*grads, strict=True):
        # as above; the exact gradient is rounded to float32 once more, where it enters the graph
        assert_as_good_as_torch(out, exact.double(), torch_out, 4.0)


@pytest.mark.parametrize("n, m", [(1, 7), (130, 9), (5, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_attention_has_its_own_number_of_keys(n, m, dtype):
    q, k, v = (torch.randn(2, heads, size, 8, dtype=dtype) for heads, size in ((4, n), (2, m), (2, m)))
    mask = torch.arange(m) < torch.tensor([[m], [m // 2]])
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.3
    for seen_keys in (None, mask):
        seen = scores if seen_keys is None else scores.masked_fill(~seen_keys[:, None, None], -torch.inf)
        o, lse = attention(q, k, v, key_mask=seen_keys, scaling=0.3)
        expected = seen.softmax(-1) @ v.double().repeat_interleave(2, 1)
        # A sum over 130 keys has fewer than 130 roundings of half an eps each.
        tolerance = 65 * torch.finfo(dtype).eps
        torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.double(), seen.logsumexp(-1), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="a window needs as many keys as queries"):
        attention(q, k, v, window=(-1, 0))

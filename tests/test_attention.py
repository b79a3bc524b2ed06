import pytest
import torch
from allocations import measure_allocations
from direct import attention_probabilities
from numerics import assert_as_good_as_torch
from pair_cases import key_mask

from pyglobenc.ops import attention
from pyglobenc.reference.attention import attention as reference_attention
from pyglobenc.reference.score_mods import DisentangledBias, RelativeBias, SoftCap, StoredBias

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
    torch.testing.assert_close(o, probabilities @ v.repeat_interleave(size[1] // size[2], dim=1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(-1, 0), (7, 7)])
def test_as_good_as_torch(window, dtype):
    q, k, v = tensors(2, 4, 2, 97, 16, dtype)
    mask = key_mask("left", 2, 97)
    o, lse = attention(q, k, v, key_mask=mask, window=window)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), key_mask=mask, window=window)
    plain, plain_lse = reference_attention(q.float(), k.float(), v.float(), mask, 0.25, window)
    seen = torch.isfinite(exact_lse)
    assert_as_good_as_torch(o[seen], exact[seen], plain[seen].to(dtype))
    assert torch.equal(torch.isfinite(lse), seen)
    if dtype == torch.float32:
        assert_as_good_as_torch(lse[seen], exact_lse[seen], plain_lse[seen])


@pytest.mark.parametrize("window", [(-1, 0), (4, 4)])
def test_gradients(window):
    q, k, v = (t.requires_grad_() for t in tensors(2, 2, 2, 20, 8))
    mask = key_mask("left", 2, 20)
    weights = torch.randn(2, 2, 20, 8, dtype=torch.float64)
    found = torch.autograd.grad((attention(q, k, v, key_mask=mask, window=window)[0] * weights).sum(), (q, k, v))
    real = (dense(q, k, v, mask, 8**-0.5, window)[1] != torch.inf)[..., None]
    reference = reference_attention(q, k, v, mask, 8**-0.5, window)[0].masked_fill(~real, 0)
    for out, exact in zip(found, torch.autograd.grad((reference * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-12)


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
        return out + 0.2 * torch.einsum("bhjd,hijd->bhij", k, queries[:, buckets[ahead]]) if name == "both" else out

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
    torch.testing.assert_close(own, torch.diagonal(scores + bias(q, k), dim1=2, dim2=3), rtol=1e-12, atol=1e-13)


def test_soft_cap():
    q, k, v = tensors(2, 4, 2, 70, 8)
    o, lse = attention(q, k, v, scaling=2.0, window=(6, 0), score_mod=SoftCap(3.0))
    exact_o, exact_lse = dense(q, k, v, None, 2.0, (6, 0), cap=3.0)
    torch.testing.assert_close(o, exact_o, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [dict(window=(-1, 0)), dict(window=(16, 16)), dict(score_mod=SoftCap(3.0))])
def test_nothing_of_size_n_n(options):
    n = 1600
    q, k, v = tensors(1, 2, 2, n, 8, torch.float32)
    used = measure_allocations(lambda: attention(q, k, v, key_mask=torch.arange(n)[None] > 9, **options))
    assert used.largest <= n * n * 4 / 4

import pytest
import torch
from numerics import until_enough
from pair_cases import Case
from relevance_cases import inputs
from sweeps import slow
from torch._subclasses.fake_tensor import FakeTensorMode

from pyglobenc.backends.shared.score_mods import SoftCap
from pyglobenc.ops import attention, relevance_rollout_step


def test_fake_tensors_have_the_result_s_shape():
    t = inputs(Case(n=9)) | dict(r=torch.rand(2, 3, 9))
    with FakeTensorMode() as mode:
        fake = (mode.from_tensor(t[name]) for name in ("r", "q", "k", "v", "lse", "grad_o", "s"))
        assert relevance_rollout_step(*fake).shape == (2, 3, 9)


def test_refusals():
    t = inputs(Case(n=9), torch.float64)
    r = torch.rand(2, 3, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match="relevance_rollout_step: r must be"):
        relevance_rollout_step(r[:, :, :4], **t)
    with pytest.raises(TypeError, match="must have one dtype"):
        relevance_rollout_step(r.float(), **t)


def gradient_map(q, k, v, grad_o, lse, mask, scaling, window, score_mod=None):
    """Return mean_h max(alpha <grad_o, v>, 0), (B, n, n) float64, from materialised arrays."""
    q, k, v, grad_o, lse = (t.double() for t in (q, k, v, grad_o, lse))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    n = q.shape[2]
    scores = q @ k.mT * scaling
    if score_mod is not None:
        scores = score_mod.cap * torch.tanh(scores / score_mod.cap)
    alpha = (scores - lse[..., None]).exp()
    ahead = torch.arange(n) - torch.arange(n)[:, None]
    left, right = (n if side < 0 else side for side in window)
    alpha = alpha.masked_fill((ahead > right) | (ahead < -left), 0)
    if mask is not None:
        alpha = alpha.masked_fill(~mask[:, None, None], 0)
    return (alpha * (grad_o @ v.mT)).clamp(min=0).mean(1)


def layer(n, heads, kv_heads, window, pads=0, score_mod=None, dtype=torch.float32, dh=16):
    """Return the tensors and settings of one layer of a decoder."""
    q, grad_o = (torch.randn(2, heads, n, dh, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(2, kv_heads, n, dh, dtype=dtype) for _ in range(2))
    mask = None
    if pads:
        mask = torch.ones(2, n, dtype=torch.bool)
        mask[1, n - pads :] = False
    settings = dict(key_mask=mask, window=window, scaling=0.3, score_mod=score_mod)
    _, lse = attention(q, k, v, **settings)
    return dict(q=q, k=k, v=v, lse=lse, grad_o=grad_o), settings


@pytest.mark.parametrize(
    "backend, window",
    [("cpu", (-1, -1)), ("cpu", (-1, 0)), ("cpu", (5, 0)), ("cpu", (4, 7)), ("triton", (5, 0))],
)
@pytest.mark.parametrize("kv_heads, pads", [slow(4, 0), (2, 3)])
def test_attention_times_its_gradient(kv_heads, pads, backend, window):
    for compare in until_enough():
        t, settings = layer(37, 4, kv_heads, window, pads)
        # enough numbers for the error rule in one draw
        r = torch.rand(2, 14, 37)
        checked = (settings["key_mask"], settings["scaling"], window)
        a = gradient_map(t["q"], t["k"], t["v"], t["grad_o"], t["lse"], *checked)
        exact = r.double() + r.double() @ a
        out = relevance_rollout_step(r, **t, s=None, **settings, backend=backend)
        plain = relevance_rollout_step(r, **t, s=None, **settings, backend="reference")
        compare(out, exact, plain)


@pytest.mark.parametrize("window", [(-1, 0), (5, 0)])
def test_a_soft_cap_runs_on_the_reference(window):
    t, settings = layer(33, 4, 2, window, score_mod=SoftCap(2.0), dtype=torch.float64)
    r = torch.rand(2, 2, 33, dtype=torch.float64)
    a = gradient_map(t["q"], t["k"], t["v"], t["grad_o"], t["lse"], None, 0.3, window, SoftCap(2.0))
    out = relevance_rollout_step(r, **t, s=None, **settings)
    assert (out - r - r @ a).abs().max() <= 1e-12 * out.abs().max()
    with pytest.raises(ValueError, match="no kernel for scores with a bias or a soft cap"):
        relevance_rollout_step(r, **t, s=None, **settings, backend="cpu")


def test_packed_sequences_without_relevance():
    t, settings = layer(12, 4, 2, (-1, 0), dtype=torch.float64)
    del settings["key_mask"]
    packed = {name: torch.cat([value[:1], value[1:]], 2) for name, value in t.items()}
    r = torch.rand(1, 2, 24, dtype=torch.float64)
    ends = torch.tensor([0, 12, 24], dtype=torch.int32)
    whole = relevance_rollout_step(r, **packed, s=None, **settings, cu_seqlens=ends)
    for index, tokens in enumerate((slice(0, 12), slice(12, 24))):
        alone = {name: value[index : index + 1] for name, value in t.items()}
        out = relevance_rollout_step(r[..., tokens], **alone, s=None, **settings)
        assert (whole[..., tokens] - out).abs().max() <= 1e-12 * out.abs().max()


def test_a_gradient_or_relevance_is_needed():
    t, settings = layer(5, 4, 4, (-1, -1))
    with pytest.raises(ValueError, match="relevance_rollout_step: grad_o or s must be given"):
        relevance_rollout_step(torch.rand(2, 1, 5), **t | dict(grad_o=None), s=None, **settings)
    with pytest.raises(ValueError, match="positive multiple of that of key-value heads"):
        relevance_rollout_step(torch.rand(2, 1, 5), **t | dict(k=t["k"][:, :3]), s=None, **settings)

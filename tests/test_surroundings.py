"""Global settings of torch around a call: autocast, another default dtype, another default device."""

from contextlib import contextmanager

import pytest
import torch
from models import ARCHITECTURES, IMAGES, PRE_NORM, build, random_batch

from pyglobenc import GlobEnc, TransformerAttribution
from pyglobenc.backends.shared.score_mods import SoftCap
from pyglobenc.methods.rollout.baselines import ROLLOUTS, Rollout
from pyglobenc.ops import linear_relevance, relevance_attention
from pyglobenc.ops.attention import attention

pytestmark = pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")

BACKENDS = ("reference", "auto")


def batch(n=9, pads=3):
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, n - pads :] = 0
    return dict(input_ids=torch.randint(5, 97, (2, n)), attention_mask=mask)


@contextmanager
def half_as_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[half_as_default, lambda: torch.device("meta")], ids=["dtype", "device"])
def elsewhere(request):
    """Return a context with other defaults.

    An array made without a dtype or device then has half the bytes that kernels expect, or none.
    """
    return request.param


def check_same(call, given, elsewhere):
    """Check that a call returns the same scores with other defaults."""
    expected = call(**given)
    with elsewhere():
        found = call(**given)
    for one, other in zip(*(r if isinstance(r, list) else [r] for r in (found, expected)), strict=True):
        assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ROLLOUTS)
def test_defaults_in_the_family(method, backend, elsewhere):
    check_same(Rollout(build("bert").float(), method, backend=backend), batch(), elsewhere)


@pytest.mark.parametrize("name", ["modernbert", "llama", "mistral"])
def test_defaults_in_globenc(name, elsewhere):
    check_same(GlobEnc(build(name).float()), batch(), elsewhere)


def test_defaults_in_packed_sequences(elsewhere):
    given = dict(input_ids=[[5, 6, 7], [8, 9]], targets=[0, 1])
    check_same(GlobEnc(build("bert").float()).packed, given, elsewhere)


@pytest.mark.parametrize("variant", ["transformer_attribution", "last_layer_ablation"])
def test_defaults_in_transformer_attribution(variant, elsewhere):
    attribute = TransformerAttribution(build("bert-classifier").float())
    check_same(attribute, batch() | dict(target=0, variant=variant, reliability="estimated"), elsewhere)


def in_half_precision(call, **given):
    with torch.autocast("cpu", torch.bfloat16):
        return call(**given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_the_forward_pass_alone(backend):
    given, model = batch(), build("bert-classifier").float()
    for method in (GlobEnc, TransformerAttribution):
        call = method(model, backend=backend)
        found, expected = in_half_precision(call, **given), in_half_precision(model, **given)
        assert (
            torch.equal(found.output.logits, expected.logits) and found.output.logits.dtype == torch.bfloat16
        )
        assert found.scores.dtype == torch.float32 and torch.isfinite(found.scores).all()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *PRE_NORM, *IMAGES])
def test_autocast_rounds_every_architecture(name):
    """Rotary embeddings, norms and products have different dtypes; the scores move by rounding alone.

    Each of three layers rounds its residual sum, attention output and MLP output once, at random.
    """
    model = build(name, torch.float32)
    given = random_batch(model, 2, 9, pads=[0, 3])
    globenc = GlobEnc(model)
    exact = globenc(**given).scores
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = globenc(**given).scores
        assert (found - exact).norm() <= 3 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_compute_as_without_autocast(backend):
    r, x, weight = torch.randn(2, 7, 5), torch.randn(2, 7, 6), torch.randn(5, 6)
    q, k, v, s, grad = torch.randn(5, 1, 2, 9, 8)
    lse = attention(q, k, v)[1]
    calls = [
        lambda: attention(q, k, v, window=(3, 2)),
        lambda: attention(q, k, v, score_mod=SoftCap(2.0)),
        lambda: (linear_relevance(r, x, weight, backend=backend),),
        lambda: relevance_attention(q, k, v, lse, grad, s, backend=backend)[:4],
    ]
    for call in calls:
        for found, expected in zip(in_half_precision(call), call(), strict=True):
            assert torch.equal(found, expected)

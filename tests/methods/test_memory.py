"""The memory contract: row mode is linear in n, and nothing of size n*n*d exists in any mode."""

import pytest
import torch
from allocations import measure_allocations
from models import build, random_batch

from pyglobenc import GlobEnc, Rollout
from pyglobenc.methods.registry import METHODS

D, HEADS, DEPTH, N = 48, 4, 3, 800
FLOAT = 4
# The flow is searched in stored maps, and occlusion takes as many forward passes as there are tokens.
LEFT_OUT = ("attention-flow", "occlusion")
DECODERS = [
    name
    for name, method in METHODS.items()
    if name not in LEFT_OUT
    and "post-norm" not in method.models
    and (method.next_token or method.target == "token")
]


def used(run, n, pads=None, **call):
    """Allocations of the second call of a method, and of the plain forward pass."""
    model = build("bert", torch.float32, max_position_embeddings=2 * N)
    method = run(model)
    batch = random_batch(model, batch=1, n=n, pads=pads)
    method(**batch, **call)
    with torch.no_grad():
        return measure_allocations(lambda: method(**batch, **call)), measure_allocations(
            lambda: model(**batch)
        )


def assert_linear(run, pads=None, **call):
    (small, _), (large, forward) = (used(run, n, pads, **call) for n in (N, 2 * N))
    assert large.largest < (2 * N) ** 2 * FLOAT / 4, "an n*n array would be larger"
    assert large.largest <= forward.largest, "the forward pass makes the largest array"
    assert large.peak <= 2.05 * small.peak
    return large.peak, forward.peak


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("pads", [None, [37]])
def test_row_mode_is_linear(backend, pads):
    peak, forward = assert_linear(
        lambda model: GlobEnc(model, backend=backend), pads, targets=[0, 5], layers=True
    )
    # x, q, k, v, o and lse of every layer are kept
    kept = 2 * N * DEPTH * (5 * D + HEADS) * FLOAT
    assert peak <= 1.2 * forward + kept


@pytest.mark.parametrize("method", ["raw-attention", "attention-rollout", "w-res", "n-fixedres"])
def test_rollout_family_is_linear(method):
    assert_linear(lambda model: Rollout(model, method))


def test_full_mode_never_forms_vectors():
    allocated, _ = used(GlobEnc, 200, maps=["N_Enc", "mix_N_Enc", "rollout"])
    # the stack of the layers' maps
    assert allocated.largest <= DEPTH * 200 * 200 * FLOAT
    assert allocated.largest < 200 * 200 * D * FLOAT


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_no_method_stores_pairs_of_8192_tokens(name, monkeypatch):
    n, method = 8192, METHODS[name]
    # Of integrated gradients, each step is a pass of its own.
    monkeypatch.setattr("pyglobenc.methods.gradients.attribution.STEPS", (2,))
    model = build("llama", torch.float32, num_hidden_layers=2, max_position_embeddings=n)
    run, batch = method.run("test", model, "auto", None), random_batch(model, batch=1, n=n)
    extra = dict(replacement=4) if method.replaces_tokens else {}
    found = measure_allocations(lambda: run({**batch, **extra}, None))
    # A mask of one byte for each pair would be larger.
    assert found.largest < n * n

import networkx
import numpy as np
import pytest
import torch
from models import build, random_batch
from published import Float64Throughout, published_maps, published_rollout

from pyglobenc import GlobEnc, Rollout
from pyglobenc.methods.rollout.baselines import OF_STAGE, ROLLOUTS


def with_residual(matrix, ratio, measured=False):
    """The published code's build_ratio_residual_attentions for one example: matrix (n, n), ratio (n,)."""
    matrix = matrix.clone()
    if measured:
        matrix.fill_diagonal_(0)
        # a causal model's first token sees itself alone
        matrix = (matrix / matrix.sum(1, keepdim=True)).nan_to_num(0)
    return matrix * ratio[:, None] + torch.diag(1 - ratio)


def published_layers(method, maps, b, n):
    """Every layer's matrix of a method for example b of n real tokens."""
    attention = maps["attention"][b, :, :, :n, :n].mean(1)
    half = torch.full((n,), 0.5, dtype=torch.float64)
    layers = []
    for index, matrix in enumerate(attention):
        deepest = "N_Enc" if "N_Enc" in maps else "N_Res"
        if method in OF_STAGE:
            layers.append(maps[deepest if method == "globenc" else OF_STAGE[method]][b, index, :n, :n])
        elif method == "w-res":
            layers.append(with_residual(matrix, maps[f"mix_{deepest}"][b, index, :n], measured=True))
        elif method == "n-fixedres":
            norms = maps["N"][b, index, :n, :n]
            layers.append(with_residual(norms / norms.sum(1, keepdim=True), half))
        elif method in ("raw-attention", "w"):
            layers.append(matrix)
        else:
            layers.append(with_residual(matrix, half))
    return torch.stack(layers)


@pytest.mark.parametrize("method", [name for name in ROLLOUTS if name not in ("attention-flow", "alti")])
@pytest.mark.parametrize("name", ["bert", "gemma2", "mpnet"])
def test_equals_published_definition(name, method):
    if name == "gemma2" and method == "n-resln":
        pytest.skip("a pre-norm model has no LayerNorm after the residual sum")
    model = build(name)
    batch = random_batch(model, batch=2, n=10, pads=[0, 3])
    maps = published_maps(model, batch)
    with Float64Throughout():
        result = Rollout(model, method)(**batch, targets=[0, 4], layers=True, maps=["layers", "rollout"])
    for b, n in enumerate((10, 7)):
        layers = published_layers(method, maps, b, n)
        rollout = published_rollout(layers[None])[0]
        exact = layers if method == "raw-attention" else rollout
        rows = (result.layer_scores * result.layer_log_scale.exp()[..., None])[b]
        torch.testing.assert_close(rows[..., :n], exact[:, [0, 4]], rtol=1e-10, atol=1e-14)
        assert not rows[..., n:].any()
        torch.testing.assert_close(result.maps["layers"][b, :, :n, :n], layers, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(result.maps["rollout"][b, :n, :n], rollout[-1], rtol=1e-10, atol=1e-14)
    assert torch.equal(result.scores, result.layer_scores[:, -1])


def test_globenc_is_a_member():
    model = build("distilbert", torch.float32)
    batch = random_batch(model, batch=2, n=8)
    assert torch.equal(Rollout(model, "globenc")(**batch).scores, GlobEnc(model)(**batch).scores)


def test_attention_flow_equals_networkx():
    model = build("bert", num_hidden_layers=2)
    batch = random_batch(model, batch=2, n=6, pads=[0, 2])
    layers = Rollout(model)(**batch, maps=["layers"]).maps["layers"]
    result = Rollout(model, "attention-flow")(**batch, targets=[1], layers=True)
    for b, n in enumerate((6, 4)):
        graph = networkx.DiGraph()
        for (index, i, j), capacity in np.ndenumerate(layers[b, :, :n, :n].numpy()):
            graph.add_edge((index + 1, i), (index, j), capacity=capacity)
        for depth in (1, 2):
            flow = torch.tensor(
                [networkx.maximum_flow_value(graph, (depth, 1), (0, j)) for j in range(n)],
                dtype=torch.float64,
            )
            row = result.layer_scores[b, depth - 1, 0] * result.layer_log_scale[b, depth - 1, 0].exp()
            # capacities are integers in steps of 1e-7
            torch.testing.assert_close(row[:n], flow / flow.sum(), rtol=0, atol=1e-6)
            assert not row[n:].any()


@pytest.mark.parametrize("method", ["w-res", "n-fixedres", "attention-rollout", "raw-attention"])
def test_one_token_keeps_all(method):
    result = Rollout(build("bert"), method)(input_ids=torch.tensor([[7]]))
    torch.testing.assert_close(
        result.scores[0] * result.log_scale.exp(), torch.ones(1, 1, dtype=torch.float64)
    )


def test_stages_of_other_layers_are_refused():
    with pytest.raises(ValueError, match="stage N_ResLN .* normalises before it; its stages are N, N_Res"):
        Rollout(build("gpt2"), "n-resln")(input_ids=torch.tensor([[7]]))


@pytest.mark.parametrize("name", ["mpnet", "gemma2"])
def test_compiled_backends_refuse_scores_with_a_bias_or_a_cap(name):
    for method in ("attention-rollout", "n-res", "w-res"):
        with pytest.raises(
            ValueError,
            match="backend 'triton' (has no kernel for scores with a bias or a soft cap|can't run)",
        ):
            Rollout(build(name, torch.float32), method, backend="triton")(input_ids=torch.full((1, 5), 7))


def test_bad_options():
    model = build("bert")
    with pytest.raises(ValueError, match="method must be one of raw-attention"):
        Rollout(model, "lime")
    with pytest.raises(ValueError, match="maps must be a sequence of names among layers, rollout"):
        Rollout(model)(input_ids=torch.tensor([[7]]), maps=["N"])

"""ALTI equals the paper's equations on the vector of every pair of tokens."""

import pytest
import torch
from allocations import measure_allocations
from attention_parts import parts
from command_line import words
from models import ARCHITECTURES, EACH, IMAGES, PRE_NORM, build, random_batch
from published import Float64Throughout
from sweeps import sweep
from tiny import tokenizer
from transformers import AutoTokenizer

import pyglobenc
from pyglobenc import Rollout
from pyglobenc.cli.main import main

ALL = [*ARCHITECTURES, *PRE_NORM, *IMAGES]


@pytest.fixture
def float64_throughout():
    with Float64Throughout():
        yield


def direct(model, batch):
    """The layers' matrices (B, L, n, n) by the equations of the paper, rows of padding 0."""
    out = []
    for modules, x, z, vectors in parts(model, batch):
        i = torch.arange(x.shape[1])
        transformed, y = vectors.sum(1), z
        transformed[:, i, i] += x
        if not modules.pre_norm:
            norm = modules.attention_norm
            std = (z.var(-1, correction=0) + norm.eps).sqrt()[:, :, None, None]
            transformed = (transformed - transformed.mean(-1, keepdim=True)) / std * norm.weight
            y = norm(z)
        distance = (y[:, :, None] - transformed).abs().sum(-1)
        c = (y.abs().sum(-1, keepdim=True) - distance).clamp(min=0)
        if "attention_mask" in batch:
            c = c * (batch["attention_mask"][:, :, None] * batch["attention_mask"][:, None])
        sums = c.sum(-1, keepdim=True)
        out.append((c / torch.where(sums > 0, sums, 1)).detach())
    return torch.stack(out, 1)


def rolled(matrices):
    out = matrices[:, 0]
    for index in range(1, matrices.shape[1]):
        out = matrices[:, index] @ out
    return out


def assert_equal(out, exact, tolerance=1e-9):
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


def values(result):
    return result.scores * result.log_scale.exp()[..., None]


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", sweep(ALL, EACH))
def test_every_architecture_equals_the_equations(name):
    model = build(name)
    for side in ("right",) if name in IMAGES else ("right", "left"):
        batch = random_batch(model, batch=3, n=11, pads=[0, 4, 7], side=side)
        targets = torch.tensor([[0, 9], [2, 5], [1, 3]] if side == "right" else [[0, 10], [4, 9], [7, 8]])
        result = Rollout(model, "alti")(**batch, targets=targets, maps=("layers", "rollout"))
        matrices = direct(model, batch)
        assert_equal(result.maps["layers"], matrices)
        exact = rolled(matrices)
        assert_equal(result.maps["rollout"], exact)
        assert_equal(values(result), exact.gather(1, targets[..., None].expand(-1, -1, exact.shape[2])))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", ["bert", "llama", "gemma2"])
def test_blocks_of_rows_and_keys(name, monkeypatch):
    """Rows that begin in the middle of a window, and keys in several tiles."""
    monkeypatch.setattr("pyglobenc.methods.rollout.alti.TILE", 1)
    monkeypatch.setattr("pyglobenc.methods.rollout.alti.MIN_KEYS", 3)
    model = build(
        name, hidden_size=12, max_position_embeddings=64, **({"head_dim": 4} if name != "bert" else {})
    )
    batch = random_batch(model, batch=2, n=31, pads=[0, 6])
    result = Rollout(model, "alti")(**batch, targets=[24], maps=["layers"])
    matrices = direct(model, batch)
    assert_equal(result.maps["layers"], matrices)
    assert_equal(values(result)[:, 0], rolled(matrices)[:, 24])


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_packed_sequences_get_what_each_gets_alone(name):
    model = build(name)
    ids = [torch.randint(5, 97, (n,)).tolist() for n in (9, 4, 4, 1)]
    alti = Rollout(model, "alti")
    for row, packed in zip(ids, alti.packed(input_ids=ids), strict=True):
        assert_equal(values(packed), values(alti(input_ids=torch.tensor([row]))))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float32(backend):
    exact, model = build("bert"), build("bert", torch.float32)
    batch = random_batch(exact, batch=2, n=11, pads=[0, 4])
    out = Rollout(model, "alti", backend=backend)(**batch, targets=[0, 3])
    # Three layers of float32, each with n*H*d roundings at most.
    assert_equal(values(out).double(), values(Rollout(exact, "alti")(**batch, targets=[0, 3])), 1e-5)


def test_the_command_line(tmp_path):
    model = build("bert", torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "a.json"
    command = words("explain --model {} {} --method alti --json {} --quiet", tmp_path / "model", "deep", out)
    assert main(command) == 0
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "model")("deep").input_ids])
    exact = Rollout(model, "alti")(input_ids=ids).scores[0, 0]
    torch.testing.assert_close(torch.as_tensor(pyglobenc.load(out).scores), exact)


@pytest.mark.parametrize("n", [2048, pytest.param(8192, marks=pytest.mark.slow)])
def test_no_array_is_quadratic(n):
    d = 48
    model = build("llama", torch.float32, num_hidden_layers=2, max_position_embeddings=n)
    batch = random_batch(model, batch=1, n=n)
    alti = Rollout(model, "alti")
    alti(**batch)
    used = measure_allocations(lambda: alti(**batch))
    # a tile of probabilities, a block of d rows, and the vectors of n / H keys of all heads
    assert used.largest <= 4 * max(1 << 19, d * n, n * 97)

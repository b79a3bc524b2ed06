"""GlobEnc on BERT-base's shape against the same model's plain forward pass (stock transformers, SDPA, float32, batch 1, random weights).

    pytest benchmarks/bench_globenc.py --csv globenc

`ratio` is the call's time over the plain forward's, measured in turn in the same process. "published" is the algorithm of the published
code, every n*n*d vector formed: 14 GB at n = 512, so it runs at n = 128 only.
"""

import pytest
import torch
from measure import paired_ratio
from published import published_maps, published_rollout
from transformers import BertConfig, BertModel

from pyglobenc import GlobEnc

LENGTHS = (128, 256, 512)
ROUNDS = 9


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BertModel(BertConfig(max_position_embeddings=4096, attn_implementation="sdpa")).eval()


def batch_of(n):
    return {"input_ids": torch.randint(1000, 30000, (1, n))}


def run(benchmark, call, forward, rounds):
    call()
    benchmark.extra_info.update(paired_ratio(call, forward, rounds))
    benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=1)


def calls(model, n):
    batch = batch_of(n)

    @torch.no_grad()
    def forward():
        return model(**batch)

    return batch, forward


@pytest.mark.parametrize("n", LENGTHS)
def bench_forward(benchmark, model, n):
    _, forward = calls(model, n)
    run(benchmark, forward, forward, ROUNDS)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("n", LENGTHS)
def bench_row_mode(benchmark, model, n, backend):
    batch, forward = calls(model, n)
    globenc = GlobEnc(model, backend=backend)
    assert_right(model, backend)
    run(benchmark, lambda: globenc(**batch), forward, ROUNDS)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("n", [128, 512])
def bench_full_mode(benchmark, model, n, backend):
    batch, forward = calls(model, n)
    globenc = GlobEnc(model, backend=backend)
    run(benchmark, lambda: globenc(**batch, maps=["N_Enc"]), forward, ROUNDS)


@pytest.mark.parametrize("n", [128])
def bench_published(benchmark, model, n):
    batch, forward = calls(model, n)
    run(benchmark, lambda: published_maps(model, batch), forward, 2)


def assert_right(model, backend):
    """The row equals that of the published algorithm, on a length that it can do in little time."""
    batch = batch_of(12)
    exact = published_rollout(published_maps(model, batch)["N_Enc"])[:, -1, :1]
    result = GlobEnc(model, backend=backend)(**batch)
    torch.testing.assert_close(result.scores * result.log_scale.exp()[..., None], exact, rtol=1e-3, atol=0)

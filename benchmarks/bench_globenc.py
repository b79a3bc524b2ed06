"""GlobEnc on BERT-base's shape against the same model's plain forward pass (stock transformers, SDPA, batch
1, random weights), float32 on a CPU, bfloat16 on a GPU. bench_lengths.py has longer inputs.

    pytest benchmarks/bench_globenc.py --csv globenc

`ratio` is the call's time over the plain forward's, measured in turn in the same process. "published" is the
algorithm of the published code, every n*n*d vector formed: 14 GB at n = 512, so it runs at n = 128 only.
"""

from functools import lru_cache

import pytest
import torch
from measure import DEVICE, finished, paired_ratio
from op_benchmark import peak_mb
from published import published_maps, published_rollout
from transformers import BertConfig, BertModel

from pyglobenc import GlobEnc

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
LENGTHS = (128, 512, 1024, 2048, 4096) if ON_GPU else (128, 256, 512)
ROUNDS = 9


@pytest.fixture(scope="module")
def model():
    return build(DTYPE)


@lru_cache
def build(dtype):
    torch.manual_seed(0)
    config = BertConfig(max_position_embeddings=4096, attn_implementation="sdpa")
    return BertModel(config).to(DEVICE, dtype).eval()


def batch_of(n):
    return {"input_ids": torch.randint(1000, 30000, (1, n)).to(DEVICE)}


def run(benchmark, call, forward, rounds):
    call, forward = finished(call), finished(forward)
    for _ in range(2):
        call(), forward()
    if ON_GPU:
        benchmark.extra_info["peak_mb"] = f"{peak_mb(call, DEVICE):.1f}"
    benchmark.extra_info.update(paired_ratio(call, forward, rounds), dtype=str(DTYPE)[6:])
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


@pytest.mark.parametrize("backend", ["reference", "auto", *(("triton", "cuda") if ON_GPU else ())])
@pytest.mark.parametrize("n", LENGTHS)
def bench_row_mode(benchmark, model, n, backend):
    batch, forward = calls(model, n)
    globenc = GlobEnc(model, backend=backend)
    try:
        assert_right(backend)
    except ValueError as error:
        pytest.skip(str(error))
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


@lru_cache
def assert_right(backend):
    """The row equals that of the published algorithm, in float32 and on a length that it can do in little
    time.
    """
    batch, model = batch_of(12), build(torch.float32)
    exact = published_rollout(published_maps(model, batch)["N_Enc"])[:, -1, :1]
    result = GlobEnc(model, backend=backend)(**batch)
    torch.testing.assert_close(result.scores * result.log_scale.exp()[..., None], exact, rtol=1e-3, atol=0)

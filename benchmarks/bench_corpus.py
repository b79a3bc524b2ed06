"""A corpus job, packed and padded, against the plain forward pass in the same padded batches: MiniLM with its
classifier, CPU or GPU.

    PYGLOBENC_CORPUS=sentences.tsv pytest benchmarks/bench_corpus.py --csv corpus

The job is all of `pyglobenc attribute` but loading the model: reading, tokens, batches, GlobEnc of 2,000
sentences or transformer attribution of 500, Parquet on disk. Its share of the forward pass's rate is 1 /
ratio. Without PYGLOBENC_CORPUS, a .tsv file without header, sentences of like lengths are made up.
"""

import os
import random
from pathlib import Path

import pytest
import torch
from measure import paired_ratio

from pyglobenc.inputs.batching import buckets
from pyglobenc.models.pretrained import SENTIMENT, load_pretrained
from pyglobenc.scale.corpus.job import Plan, attribute_records, encode_records, make_runner, run_job
from pyglobenc.scale.corpus.records import open_source

SENTENCES, SHARD_SIZE, ROUNDS = {"globenc": 2000, "transformer-attribution": 500}, 1000, 3
WORDS = "a the film movie of and with is deep good bad long story never makes one feel".split()


@pytest.fixture
def source(tmp_path_factory, method):
    """A corpus of as many lines as the method is given."""
    count = SENTENCES[method]
    given, path = os.environ.get("PYGLOBENC_CORPUS"), tmp_path_factory.mktemp("corpus") / "sentences.tsv"
    if given:
        lines = Path(given).read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    else:
        chance = random.Random(0)
        # SST-2's sentences have 19 words on average, 9 in the standard deviation
        lines = [
            " ".join(chance.choices(WORDS, k=max(1, round(chance.gauss(19, 9))))) + "\n" for _ in range(count)
        ]
    path.write_text("".join(lines), encoding="utf-8")
    return open_source(path, header=False)


@pytest.fixture(scope="module")
def model():
    try:
        return load_pretrained(SENTIMENT)
    except ValueError as error:
        pytest.skip(str(error))


def plain_forward(runner, batches):
    """The model alone on batches that are ready."""

    @torch.no_grad()
    def forward():
        for batch in batches:
            output = runner.model(**batch)
        return output.logits.cpu()

    return forward


def batches_of(runner, records, batch_tokens):
    """What the model is given in a job of these records."""
    out = []
    for start in range(0, len(records), SHARD_SIZE):
        texts, _ = encode_records(runner, records[start : start + SHARD_SIZE])
        for bucket in buckets(texts, batch_tokens):
            out.append(runner._batch([text for _, text in bucket], [text.windows[0] for _, text in bucket]))
    return out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_tokens", [1024, 4096])
@pytest.mark.parametrize("method", SENTENCES)
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def bench_attribute(benchmark, source, model, tmp_path, method, batch_tokens, packed):
    runner = make_runner(*model, method=method, packed=packed)
    records = list(source.records())
    assert not attribute_records(runner, records[:50], batch_tokens)[1], "every sentence is attributed"
    forward = plain_forward(runner, batches_of(runner, records, batch_tokens))
    common = {"method": method, "model": "benchmark", "dtype": "float32", "settings": {}}

    def job():
        plan = Plan(source, tmp_path, SHARD_SIZE, batch_tokens, common)
        summary = run_job(runner, plan, lambda count: None)
        assert summary.attributed == len(records)
        for shard in tmp_path.glob("*.parquet"):
            shard.unlink()

    ratio = paired_ratio(job, forward, ROUNDS)
    benchmark.pedantic(job, rounds=ROUNDS, iterations=1)
    rate = len(records) / benchmark.stats.stats.median
    of_forward = f"{1 / float(ratio['ratio']):.3f}"
    benchmark.extra_info.update(
        sentences=len(records), **ratio, sentences_per_s=f"{rate:.1f}", of_forward=of_forward
    )

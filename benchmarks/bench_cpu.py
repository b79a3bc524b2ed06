"""What the CPU kernels must cost, against the same model's plain forward pass (stock transformers, SDPA,
float32, random weights).

    pytest benchmarks/bench_cpu.py --csv cpu

`ratio` is the call's time over the plain forward's, measured in turn; `gflops` of a kernel stand beside the
GEMM's of the same run. With --threads 1 the clock is the thread's own processor time, which neighbours on a
shared machine don't lengthen.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from pyglobenc import GlobEnc, TransformerAttribution, capture
from pyglobenc.ops import head_gram, pair_norms, rollout_step

DEVICE = torch.device("cpu")
BASE = dict(max_position_embeddings=4096)
MINILM = dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
LONG = 16_384
SHAPES = {"bert-base": (12, 64), "minilm": (12, 32)}


def build(settings, kind=BertModel):
    return kind(BertConfig(**settings, attn_implementation="sdpa")).eval()


@pytest.fixture(scope="module")
def base():
    return build(BASE)


def clock():
    """Seconds, of this thread's processor time if it is the only one."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(call):
    start = clock()
    call()
    return clock() - start


def compare(benchmark, model, call, batch, rounds):
    """Time call(**batch) and record its ratio to the plain forward pass, by medians of neighbours in time."""

    @torch.no_grad()
    def forward():
        return model(**batch)

    forward(), call(**batch)
    pairs = [(seconds(forward), seconds(lambda: call(**batch))) for _ in range(rounds)]
    ratios = sorted(own / plain for plain, own in pairs)
    benchmark.extra_info.update(
        ratio=f"{median(ratios):.3f}",
        ratio_low=f"{ratios[0]:.3f}",
        ratio_high=f"{ratios[-1]:.3f}",
        ratio_of_best=f"{min(own for _, own in pairs) / min(plain for plain, _ in pairs):.3f}",
        forward_s=f"{min(plain for plain, _ in pairs):.4f}",
    )
    benchmark.pedantic(lambda: call(**batch), rounds=1, iterations=1)


def ids(n):
    return {"input_ids": torch.randint(1000, 30000, (1, n))}


@pytest.mark.parametrize("n, rounds", [(128, 15), (512, 9), (2048, 3), (4096, 3)])
def bench_globenc_row(benchmark, base, n, rounds):
    compare(benchmark, base, GlobEnc(base), ids(n), rounds)


@pytest.mark.parametrize("n, rounds", [(128, 61), (512, 21)])
def bench_globenc_row_minilm(benchmark, n, rounds):
    model = build(MINILM)
    compare(benchmark, model, GlobEnc(model), ids(n), rounds)


@pytest.mark.parametrize("n, rounds", [(512, 4)])
def bench_globenc_maps(benchmark, base, n, rounds):
    globenc = GlobEnc(base)
    compare(benchmark, base, lambda **batch: globenc(**batch, maps=["N_Enc"]), ids(n), rounds)


@pytest.mark.parametrize("n, rounds", [(128, 4), (512, 2)])
def bench_transformer_attribution(benchmark, n, rounds):
    model = build(BASE, BertForSequenceClassification)
    compare(benchmark, model, TransformerAttribution(model), ids(n), rounds)


def bench_padded_batch(benchmark, base):
    """32 sentences of 10 to 60 tokens."""
    n = torch.randint(10, 61, (32,))
    n[0] = 60
    mask = (torch.arange(60) < n[:, None]).long()
    batch = {"input_ids": torch.randint(1000, 30000, (32, 60)), "attention_mask": mask}
    compare(benchmark, base, GlobEnc(base), batch, 3)


def bench_gemm(benchmark):
    """What the kernels' speed is measured against: torch's matrix product of a feed-forward layer."""
    a, b = torch.randn(1024, 768), torch.randn(768, 3072)
    report(benchmark, lambda: a @ b, 2 * 1024 * 768 * 3072)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [128, 512, 2048])
@pytest.mark.parametrize("op", ["rollout_step", "pair_norms", "head_gram"])
def bench_kernel(benchmark, op, n, shape):
    H, dh = SHAPES[shape]
    q, k, v = (torch.randn(1, n, H, dh).transpose(1, 2) for _ in range(3))
    lse = torch.logsumexp(q @ k.transpose(2, 3) * dh**-0.5, -1)
    kernel = torch.randn(H, dh, H, dh)
    gram = torch.randn(1, n, H, H)
    r, log_scale = torch.rand(1, 1, n), torch.zeros(1, 1)
    pairs = n * n * (2 * H * dh + H * (H + 1))
    calls = {
        "rollout_step": (lambda: rollout_step(r, log_scale, q, k, lse, gram, backend="cpu"), pairs),
        "pair_norms": (lambda: pair_norms(q, k, lse, gram, backend="cpu"), pairs),
        "head_gram": (lambda: head_gram(v, kernel, backend="cpu"), n * H * (H + 1) * dh * dh),
    }
    report(benchmark, *calls[op])


def report(benchmark, call, flops):
    """Time a call and record the arithmetic that it can't do without, the exponentials left out."""
    call()
    benchmark.extra_info["gflops"] = f"{flops / min(seconds(call) for _ in range(15)) / 1e9:.1f}"
    benchmark.pedantic(call, rounds=3, iterations=1)


def bench_long_sequence(benchmark):
    """Two layers at n = 16,384, each call in a process of its own for its peak memory."""
    runs = {what: alone(what, LONG, layers=2) for what in ("load", "forward")}
    benchmark.pedantic(lambda: runs.update(globenc=alone("globenc", LONG, layers=2)), rounds=1, iterations=1)
    benchmark.extra_info["n"] = LONG
    for what, (took, peak, _) in runs.items():
        benchmark.extra_info.update({f"{what}_s": f"{took:.2f}", f"{what}_peak_mb": f"{peak:.0f}"})


@pytest.mark.parametrize("n", [128, 512, 2048, 4096])
def bench_peak_memory(benchmark, n):
    """BERT-base, each call in a process of its own: GlobEnc's peak over the forward's and the captured
    layers' together.
    """
    runs = {what: alone(what, n) for what in ("load", "forward", "capture")}
    benchmark.pedantic(lambda: runs.update(globenc=alone("globenc", n)), rounds=1, iterations=1)
    benchmark.extra_info.update(
        {f"{what}_peak_mb": f"{runs[what][1]:.0f}" for what in ("load", "forward", "globenc")}
    )
    states = runs["capture"][2]
    ratio = runs["globenc"][1] / (runs["forward"][1] + states)
    benchmark.extra_info.update(states_mb=f"{states:.0f}", of_forward_and_states=f"{ratio:.3f}")


def alone(what, n, layers=12):
    """Seconds, peak resident MiB and MiB of captured layers of one call, in a process of its own."""
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, __file__, what, str(n), str(layers), threads],
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(map(float, done.stdout.split()[-3:]))


def main(what, n, layers, threads):
    from measure import forget_resident_peak, resident_mb

    torch.set_num_threads(int(threads))
    model = build(dict(max_position_embeddings=int(n), num_hidden_layers=int(layers)))
    batch, states = ids(int(n)), 0
    forget_resident_peak()
    start = time.perf_counter()
    with torch.no_grad():
        if what == "forward":
            model(**batch)
        elif what == "globenc":
            GlobEnc(model)(**batch)
        elif what == "capture":
            with capture(model) as trace:
                model(**batch)
            states = size_mb(trace.layers)
    print(time.perf_counter() - start, resident_mb(), states)


def size_mb(layers):
    """MiB of the tensors that captured layers hold, what they share once."""
    held = [t for layer in layers for t in (layer.x, layer.q, layer.k, layer.v, layer.o, layer.lse)]
    held += [t for layer in layers for stats in layer.norms.values() for t in (stats.mean, stats.rstd)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()) / 2**20


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])

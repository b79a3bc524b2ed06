import logging

import pytest
import torch
from models import build, random_batch
from published import Float64Throughout
from tiny import classifier, tokenizer

from pyglobenc import GlobEnc
from pyglobenc.inputs.batches import Runner
from pyglobenc.inputs.batching import SHARE, available_bytes, fitting_batch, in_batches, out_of_memory
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.windows import encode
from pyglobenc.methods.memory import estimate_memory


def test_as_many_as_the_estimate_says():
    model = build("bert", torch.float32)
    for count in (1, 3, 7):
        estimate = estimate_memory(model, batch=count, n=30)
        available = int((estimate.kernels + estimate.saved + estimate.workspace) / SHARE) + 1
        assert fitting_batch(model, 30, 64, available=available) == count
        assert fitting_batch(model, 30, count, available=10**12) == count
    assert fitting_batch(model, 30, 64, available=0) == 1
    assert fitting_batch(model, 30, 64, method="another", available=0) == 1
    assert fitting_batch(model, 30, 64, method="transformer-attribution", available=0) == 1


def test_what_is_free_is_known():
    assert 2**20 < available_bytes(torch.device("cpu")) < 2**50
    assert available_bytes(torch.device("meta")) is None


def limited(most, calls):
    """A run that is out of memory for more than `most` jobs."""

    def run(batch):
        calls.append(len(batch))
        if len(batch) > most:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 1 bytes."
            )
        return [job * 10 for job in batch]

    return run


def test_halved_when_memory_runs_out(caplog):
    calls = []
    with caplog.at_level(logging.WARNING, "pyglobenc"):
        done = list(in_batches(limited(3, calls), range(13), 9))
    assert done == [(job, job * 10) for job in range(13)]
    # 9 and 5 are too many; 3 fit from then on
    assert calls == [9, 5, 3, 3, 3, 3, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 9 examples at once; going on with 5",
        "out of memory with 5 examples at once; going on with 3",
    ]


def test_errors_pass():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        list(in_batches(limited(0, []), range(4), 2))
    with pytest.raises(RuntimeError, match="another"):
        list(in_batches(lambda batch: (_ for _ in ()).throw(RuntimeError("another")), range(4), 2))


def test_torch_says_so():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    for message in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
    ):
        assert out_of_memory(RuntimeError(message))
    assert not out_of_memory(ValueError("q must be (B, H, n, dh)"))
    assert not out_of_memory(
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448.")
    )


def test_explain_goes_on_with_smaller_batches(caplog):
    texts = ["deep good film"] * 7
    runner = Runner(classifier(), tokenizer(), Options(batch_size=5))
    encoded = [encode(tokenizer(), text, "text", 40, "error", None) for text in texts]
    exact = list(runner.run(encoded))
    whole, sizes = runner._run, []

    def limited_memory(batch, targets):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(batch, targets)

    runner._run = limited_memory
    with caplog.at_level(logging.WARNING, "pyglobenc"):
        found = list(runner.run(encoded))
    assert sizes == [5, 3, 2, 2, 2, 1]
    assert len(caplog.records) == 2
    for out, plain in zip(found, exact, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(out["scores"]), torch.as_tensor(plain["scores"]), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["albert", "mpnet", "deberta-v3", "modernbert", "gpt2", "qwen2", "gemma2"])
def test_mixed_lengths_equal_one_at_a_time(name, side):
    """Rotary and relative positions are the same for moved tokens; absolute ones are given.

    The targets are given too, since a head that reads the first position reads padding there.
    """
    model = build(name)
    batch = random_batch(model, 3, 11, pads=[0, 3, 8], side=side)
    if name in ("gpt2", "albert"):
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    real_tokens = batch["attention_mask"].bool()
    first = real_tokens.int().argmax(1, keepdim=True)
    with Float64Throughout():
        together = GlobEnc(model)(**batch, targets=first).scores
        for b, real in enumerate(real_tokens):
            alone = GlobEnc(model)(input_ids=batch["input_ids"][b : b + 1, real], targets=[0]).scores
            torch.testing.assert_close(together[b : b + 1, :, real], alone, rtol=1e-9, atol=1e-12)
            assert not together[b, :, ~real].any()

"""Gradient-weighted rollout equals the paper's equations on stored attention probabilities."""

import pytest
import torch
import transformers
from allocations import measure_allocations
from models import ARCHITECTURES, CAUSAL, EACH, IMAGES, PRE_NORM, Classifier, build, classifier, random_batch
from published import Float64Throughout
from sweeps import slow, sweep

from pyglobenc.backends.reference import attention as reference_attention
from pyglobenc.methods.gradients.gradient_rollout import GradientRollout
from pyglobenc.methods.precision.reliability import NoRelevanceWarning

ALL = [*ARCHITECTURES, *PRE_NORM, *IMAGES]


def direct(model: Classifier, batch: dict, target: int, start_layer: int = 0) -> torch.Tensor:
    """Rows of R, (B, n), from the stored attention probabilities of every layer and their gradients."""
    encoder = model.encoder
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    probabilities = []
    forward = encoder.forward

    def keep(**inputs):
        out = forward(**inputs, output_attentions=True)
        probabilities.extend(out.attentions)
        return out

    encoder.forward = keep
    try:
        logit = model(**batch)[:, target].sum()
    finally:
        del encoder.forward
        encoder.set_attn_implementation(before)
    gradients = torch.autograd.grad(logit, probabilities)
    size, n = len(probabilities[0]), probabilities[0].shape[-1]
    r = torch.eye(n, dtype=torch.float64).expand(size, n, n)
    for alpha, gradient in list(zip(probabilities, gradients, strict=True))[start_layer:]:
        r = r + (alpha * gradient).clamp(min=0).mean(1) @ r
    mask = batch.get("attention_mask", torch.ones(size, n)).double()
    if model.reads == "mean":
        return torch.einsum("bi,bij->bj", mask / mask.sum(1, keepdim=True), r).detach()
    index = (mask * torch.arange(n)).argmax(1) if model.reads == "last" else mask.argmax(1)
    return r[torch.arange(size), index].detach()


def assert_equal(out: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("name", sweep(ALL, EACH))
def test_every_architecture_equals_the_equations(name):
    reads = "last" if name in CAUSAL else "first"
    model = classifier(name, reads)
    with Float64Throughout():
        for side in ("right",) if name in IMAGES else ("right", "left"):
            batch = random_batch(model.encoder, batch=3, n=11, pads=[0, 4, 7], side=side)
            for start in (0, 1):
                result = GradientRollout(model)(**batch, target=1, start_layer=start)
                assert_equal(result.scores, direct(model, batch, 1, start))
                assert not result.nothing.any() and (result.target == 1).all()


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_a_mean_of_tokens_is_the_mean_of_their_rows(name):
    model = classifier(name, "mean")
    batch = random_batch(model.encoder, batch=2, n=9, pads=[0, 3])
    with Float64Throughout():
        result = GradientRollout(model)(**batch, target=2)
        assert result.position is None
        assert_equal(result.scores, direct(model, batch, 2))


@pytest.mark.parametrize("name", [name for name in CAUSAL if not name.startswith(("qwen3", "gemma"))])
def test_a_language_model_explains_its_next_token(name):
    model = build(name)
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    explain = GradientRollout(model)
    result = explain(**batch)
    assert result.position.tolist() == [8, 5]
    assert (
        result.target.tolist()
        == result.output.logits[torch.tensor([0, 1]), result.position].argmax(-1).tolist()
    )
    earlier = explain(**batch, position=[3, 4], target=7)
    # A query sees no later key, and its row of R has no entry there.
    assert (earlier.scores[0, 4:] == 0).all() and (earlier.scores[1, 5:] == 0).all()
    for row, end in ((0, 4), (1, 5)):
        alone = {key: value[row : row + 1, :end] for key, value in batch.items()}
        assert_equal(earlier.scores[row, :end], explain(**alone, target=7).scores[0])


@pytest.mark.parametrize("name", ["roberta", "nomic-bert", "modernbert"])
def test_packed_and_padded_sequences_get_what_each_gets_alone(name):
    model = build(name)
    lengths = [11, 5, 8]
    batch = random_batch(model, batch=3, n=11, pads=[0, 6, 3])
    explain = GradientRollout(model)
    padded = explain(**batch, target=1)
    lists = [row[:length].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)]
    packed = explain.packed(input_ids=lists, target=1)
    for index, ids in enumerate(lists):
        alone = explain(input_ids=torch.tensor([ids]), target=1)
        assert_equal(padded.scores[index, : len(ids)], alone.scores[0])
        assert (padded.scores[index, len(ids) :] == 0).all()
        assert_equal(packed[index].scores[0], alone.scores[0])
        assert torch.equal(packed[index].position, alone.position)


def test_the_model_is_left_as_it_was():
    model = build("llama", torch.float32)
    model.get_output_embeddings().weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():
        batch = random_batch(model, batch=1, n=6)
        GradientRollout(model)(**batch)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_and_float64_arithmetic():
    exact_model = build("llama", torch.float64)
    batch = random_batch(exact_model, batch=2, n=9)
    exact = GradientRollout(exact_model)(**batch, target=3)
    for dtype, digits in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        scores = GradientRollout(build("llama", dtype))(**batch, target=3).scores
        assert scores.dtype == digits
    assert (
        GradientRollout(build("llama", torch.float32), dtype=torch.float64)(**batch).scores.dtype
        == torch.float64
    )
    single = GradientRollout(build("llama", torch.float32))(**batch, target=3).scores
    assert_equal(single.double(), exact.scores, 1e-4)


def test_no_gradient_is_no_relevance():
    model = classifier("bert", "first")
    for layer in model.encoder.encoder.layer:
        torch.nn.init.zeros_(layer.attention.output.dense.weight)
    with pytest.warns(NoRelevanceWarning):
        result = GradientRollout(model)(**random_batch(model.encoder, batch=2, n=7), target=0)
    assert result.nothing.all() and (result.scores == 0).all()


def test_refusals():
    model = classifier("bert", "first")
    batch = random_batch(model.encoder, batch=2, n=7)
    explain = GradientRollout(model)
    for arguments, message in (
        (dict(start_layer=3), "start_layer must lie in"),
        (dict(target=3), "target"),
        (dict(position=0), "position names a token's logit"),
        (dict(layer=1), "layer"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            explain(**batch, **arguments)
    with pytest.raises(ValueError, match="no head to explain"):
        GradientRollout(model.encoder)(**batch)
    with pytest.raises(ValueError, match="name the token: position"):
        masked = transformers.BertForMaskedLM(model.encoder.config).double().eval()
        GradientRollout(masked)(**batch)


@pytest.mark.parametrize("name", ["gemma3", slow("llama"), slow("gemma2")])
def test_memory_is_linear_in_the_number_of_tokens(name, monkeypatch):
    # Shorter texts than the real limit allows take less time.
    monkeypatch.setattr(reference_attention, "STORED", 512)
    model = build(name, torch.float32, max_position_embeddings=8192)
    explain, peaks = GradientRollout(model), []
    for n in (1024, 2048):
        batch = random_batch(model, batch=1, n=n)
        explain(**batch)
        used = measure_allocations(lambda batch=batch: explain(**batch))
        # The largest arrays are the logits, (n, 97), and a tile of 64 queries of all 4 heads with all keys.
        assert used.largest <= 4 * max(1 << 18, 64 * 4 * n, n * 97)
        peaks.append(used.peak)
    # Twice as many tokens take twice the memory, where arrays (n, n) would take four times as much.
    assert peaks[1] < 2.5 * peaks[0]

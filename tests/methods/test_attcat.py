"""AttCAT equals its paper's equation on stored attention probabilities, hidden states and their gradients."""

import pytest
import torch
import transformers
from allocations import measure_allocations
from models import ARCHITECTURES, CAUSAL, EACH, IMAGES, PRE_NORM, build, classifier, random_batch
from published import Float64Throughout
from sweeps import sweep
from tiny import tokenizer
from torch import nn

from pyglobenc import explain_generation
from pyglobenc.backends.reference import attention as reference_attention
from pyglobenc.methods.gradients.attcat import AttCat

ALL = [*ARCHITECTURES, *PRE_NORM, *IMAGES]


def direct(model: nn.Module, batch: dict, logit) -> torch.Tensor:
    """Scores (B, n) of what logit(output) picks, from the states and probabilities that transformers returns.

    All tokens of the batch attend, except padding.
    """
    encoder = getattr(model, "encoder", model)
    before, forward, kept = encoder.config._attn_implementation, encoder.forward, {}

    def keep(**inputs):
        kept["out"] = forward(**inputs, output_attentions=True, output_hidden_states=True)
        return kept["out"]

    encoder.set_attn_implementation("eager")
    encoder.forward = keep
    try:
        y = logit(model(**batch)).sum()
    finally:
        del encoder.forward
        encoder.set_attn_implementation(before)
    attentions = kept["out"].attentions
    states = kept["out"].hidden_states[: len(attentions)]
    size, n = states[0].shape[:2]
    mask = batch.get("attention_mask", torch.ones(size, n)).double()
    scores = 0
    for x, g, alpha in zip(states, torch.autograd.grad(y, states), attentions, strict=True):
        received = torch.einsum("bi,bhij->bj", mask / mask.sum(1, keepdim=True), alpha) / alpha.shape[1]
        scores = scores + (x * g).sum(-1) * received
    return scores.detach()


def assert_equal(out: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("name", sweep(ALL, EACH))
def test_every_architecture_equals_the_equation_in_batches_and_alone(name):
    model = classifier(name, "last" if name in CAUSAL else "first")
    pads = [0, 4, 7]
    with Float64Throughout():
        for side in ("right",) if name in IMAGES else ("right", "left"):
            batch = random_batch(model.encoder, batch=3, n=11, pads=pads, side=side)
            scores = AttCat(model)(**batch, target=1, contrast=2).scores
            assert_equal(scores, direct(model, batch, lambda out: out[:, 1] - out[:, 2]))
            if name in IMAGES or side == "left":
                # Absolute positions move with padding on the left.
                continue
            for row in range(3):
                real = batch["attention_mask"][row].bool()
                alone = {key: value[row : row + 1, real] for key, value in batch.items()}
                own = AttCat(model)(**alone, target=1, contrast=2).scores[0]
                assert_equal(scores[row, real], own)
                assert (scores[row, ~real] == 0).all()


@pytest.mark.parametrize("name", [name for name in CAUSAL if not name.startswith(("qwen3", "gemma"))])
def test_each_logit_of_a_language_model_is_that_of_the_text_up_to_its_token(name):
    model = build(name)
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    attcat = AttCat(model)
    positions = torch.tensor([[3, 8], [4, 5]])
    with Float64Throughout():
        several = attcat(**batch, position=positions, target=7)
        # Without a position, the next token is explained.
        assert_equal(attcat(**batch, target=7).scores, several.scores[:, 1])
        for row in range(2):
            for t in range(2):
                end = int(positions[row, t]) + 1
                alone = {key: value[row : row + 1, :end] for key, value in batch.items()}
                exact = direct(model, alone, lambda out: out.logits[:, -1, 7])
                assert_equal(several.scores[row, t, :end], exact[0])
                assert (several.scores[row, t, end:] == 0).all()


def test_an_answer_gets_a_row_for_each_token():
    model, tok = build("llama"), tokenizer()
    a = explain_generation(model, tok, "a film", "attcat", max_new_tokens=3)
    ids = torch.tensor([a.token_ids])
    for row, end in enumerate(range(a.prompt_length, len(a.token_ids))):
        one = AttCat(model)(input_ids=ids[:, :end], target=int(ids[0, end])).scores[0]
        assert a.scores[row, :end] == pytest.approx(one.numpy(), rel=1e-9)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_narrow_models(backend):
    exact_model = build("llama", torch.float64)
    batch = random_batch(exact_model, batch=2, n=9, pads=[0, 2])
    exact = AttCat(exact_model)(**batch, target=3).scores
    scores = AttCat(build("llama", torch.float32), backend)(**batch, target=3).scores
    assert scores.dtype == torch.float32
    assert_equal(scores.double(), exact, 1e-4)
    widened = AttCat(build("llama", torch.float32), backend="reference", dtype=torch.float64)
    assert widened(**batch, target=3).scores.dtype == torch.float64
    assert AttCat(build("llama", torch.bfloat16))(**batch, target=3).scores.dtype == torch.float32


def test_memory_is_linear_in_the_number_of_tokens(monkeypatch):
    # Shorter texts than the real limit allows take less time.
    monkeypatch.setattr(reference_attention, "STORED", 512)
    model = build("llama", torch.float32, max_position_embeddings=8192)
    attcat, peaks = AttCat(model), []
    for n in (1024, 2048):
        batch = random_batch(model, batch=1, n=n)
        attcat(**batch)
        used = measure_allocations(lambda batch=batch: attcat(**batch))
        # The largest arrays are the logits, (n, 97), and a tile of 64 queries of all 4 heads with all keys.
        assert used.largest <= 4 * max(1 << 18, 64 * 4 * n, n * 97)
        peaks.append(used.peak)
    # Twice as many tokens take twice the memory, where arrays (n, n) would take four times as much.
    assert peaks[1] < 2.5 * peaks[0]


class Cut(nn.Module):
    """Cuts the gradient of its input off."""

    def forward(self, h):
        return h.detach()


def test_refusals():
    model = classifier("bert", "first")
    batch = random_batch(model.encoder, batch=2, n=7)
    attcat = AttCat(model)
    for arguments, message in (
        (dict(target=3), "AttCat: target must lie in"),
        (dict(position=0), "AttCat: position names a token's logit"),
        (dict(targe=1), "AttCat: takes no targe; did you mean target"),
        (dict(start_layer=1), "AttCat: takes no start_layer"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            attcat(**batch, **arguments)
    with pytest.raises(ValueError, match="no head to explain"):
        AttCat(model.encoder)(**batch)
    with pytest.raises(ValueError, match="name the token: position"):
        AttCat(transformers.BertForMaskedLM(model.encoder.config).double().eval())(**batch)
    model.linear = nn.Sequential(Cut(), model.linear)
    with pytest.raises(ValueError, match="no gradient at"):
        AttCat(model)(**batch)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

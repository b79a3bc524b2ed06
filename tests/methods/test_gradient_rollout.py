"""Gradient-weighted rollout equals the paper's equations on the attention probabilities that a model returns."""

import pytest
import torch
from models import ARCHITECTURES, CAUSAL, IMAGES, PRE_NORM, build, random_batch
from published import Float64Throughout
from torch import nn

from pyglobenc.methods.gradients.gradient_rollout import GradientRollout

ALL = [*ARCHITECTURES, *PRE_NORM, *IMAGES]


class Classifier(nn.Module):
    """A user's module with a linear head that reads the last real token, the first one, or the mean."""

    def __init__(self, encoder: nn.Module, reads: str):
        super().__init__()
        self.encoder, self.reads = encoder, reads
        self.linear = nn.Linear(encoder.config.hidden_size, 3).to(encoder.dtype)

    def forward(self, **batch):
        h = self.encoder(**batch).last_hidden_state
        mask = batch.get("attention_mask")
        mask = torch.ones_like(h[..., 0]) if mask is None else mask.to(h.dtype)
        if self.reads == "mean":
            h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            index = (mask * torch.arange(h.shape[1])).argmax(1) if self.reads == "last" else mask.argmax(1)
            h = h[torch.arange(len(h)), index]
        return self.linear(h)


def classifier(name: str, reads: str, dtype: torch.dtype = torch.float64) -> Classifier:
    model = build(name, dtype).base_model
    return Classifier(model, reads).eval()


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


@pytest.mark.parametrize("name", ALL)
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

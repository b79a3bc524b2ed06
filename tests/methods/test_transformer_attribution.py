import pytest
import torch
from chefer import chefer_golden, relative
from sweeps import slow

from pyglobenc import TransformerAttribution
from pyglobenc.methods.relevance.propagation import RelevancePropagation
from pyglobenc.methods.relevance.rules import Rules
from pyglobenc.methods.relevance.states import run_forward

INTERNALS = {"map": "map", "R_alpha": "R_A", "grad_alpha": "grad_A", "R_in": "R_in"}

# how the published code overwrites the pooled token's own entry
BERT_VARIANTS = {
    "generate_LRP": ("generate_LRP_start0", "min"),
    "last_layer": ("generate_LRP_last_layer", "zero"),
    "full": ("generate_full_lrp", "zero"),
    "last_layer_attn": ("generate_attn_last_layer", "zero"),
    "attention_rollout": ("generate_rollout", "zero"),
    "attn_gradcam": ("generate_attn_gradcam", "zero"),
}
VIT_VARIANTS = (
    "transformer_attribution rollout full last_layer last_layer_ablation last_layer_attn second_layer "
    "second_layer_ablation"
).split()

# float64: rounding amplified by the ill-conditioned divisions; float32: what the published code's own float32
# reaches, within a factor 3
MODES = [(torch.float64, None, 1e-10), slow(torch.float32, torch.float64, 1e-10), (torch.float32, None, 1e-2)]


def overwritten(scores, how):
    scores = scores.clone()
    scores[:, 0] = scores.min() if how == "min" else 0
    return scores


def check_internals(ta, batch, target, explained, published, tolerance):
    """Compare the maps and the relevance of every layer, and the explained class, with the published ones."""
    result = ta(**batch, target=target, layers=True, maps=tuple(INTERNALS))
    assert result.target.item() == explained
    for name, internal in INTERNALS.items():
        assert relative(result.maps[name][0], published[f"internals.{internal}"]) <= tolerance, name
    assert relative(result.relevance[0], published["internals.R_in_token_sums"]) <= tolerance
    assert result.diagnostics["conservation"].max() <= 1e-6


@pytest.mark.parametrize("model_dtype, dtype, tolerance", MODES)
def test_bert_equals_published_outputs(model_dtype, dtype, tolerance):
    model, cases = chefer_golden("chefer_bert", model_dtype)
    ta = TransformerAttribution(model, dtype=dtype)
    for index, (batch, target, explained, published) in enumerate(cases):
        check_internals(ta, batch, target, explained, published, tolerance)
        for variant, (name, how) in BERT_VARIANTS.items():
            if variant == "attn_gradcam" and not batch["attention_mask"].all():
                continue  # the published mean runs over padding
            scores = ta(**batch, target=target, variant=variant).scores
            assert relative(overwritten(scores, how), published[name]) <= tolerance, (index, variant)
        scores = ta(**batch, target=target, start_layer=1).scores
        assert relative(overwritten(scores, "min"), published["generate_LRP_start1"]) <= tolerance


@pytest.mark.parametrize("model_dtype, dtype, tolerance", MODES)
def test_vit_equals_published_outputs(model_dtype, dtype, tolerance):
    model, cases = chefer_golden("chefer_vit", model_dtype)
    ta = TransformerAttribution(model, dtype=dtype)
    for index, (batch, target, explained, published) in enumerate(cases):
        check_internals(ta, batch, target, explained, published, tolerance)
        for variant in VIT_VARIANTS:
            scores = ta(**batch, target=target, variant=variant).scores
            assert relative(scores, published[variant].reshape_as(scores)) <= tolerance, (index, variant)
        scores = ta(**batch, target=target, start_layer=1).scores
        assert relative(scores, published["transformer_attribution_start1"]) <= tolerance


@pytest.mark.parametrize("name", ["chefer_bert", "chefer_vit"])
def test_last_layer_alone_starts_there(name):
    model, cases = chefer_golden(name)
    ta = TransformerAttribution(model)
    for batch, target, _, _ in cases:
        last = ta(**batch, target=target, variant="transformer_attribution_last").scores
        whole = ta(**batch, target=target, start_layer=ta.depth - 1).scores
        assert torch.equal(last, whole)
        assert not torch.equal(last, ta(**batch, target=target).scores)


@pytest.mark.parametrize("name", ["chefer_bert", "chefer_vit"])
def test_float32_rules_on_shared_activations(name):
    # the forward pass in float32 for both, so that only the rules' own rounding is left
    model, cases = chefer_golden(name, torch.float32)
    for batch, target, _, _ in cases:
        states = run_forward(model, batch, (target, None, None), None, 0)
        row, r = RelevancePropagation(states, Rules("auto"), True, name == "chefer_bert").roll_out(0, 0)
        widened = run_forward(model, batch, (target, None, None), None, 0)
        widened.dtype, widened.head = torch.float64, widened.head.to(torch.float64)
        widened.grads = [grad.double() for grad in states.grads]
        for layer in widened.layers:
            for part in ("x", "q", "k", "v", "o", "lse"):
                setattr(layer, part, getattr(layer, part).double())
        exact, r_exact = RelevancePropagation(widened, Rules("auto"), True, name == "chefer_bert").roll_out(
            0, 0
        )
        assert relative(row, exact) <= 1e-5
        assert relative(r, r_exact) <= 1e-5

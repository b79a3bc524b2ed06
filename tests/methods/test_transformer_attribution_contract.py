"""What transformer attribution leaves behind, stores and refuses; how trustworthy its digits are."""

import math
import warnings

import pytest
import torch
from allocations import measure_allocations
from chefer import chefer_golden, relative
from models import IMAGE, SMALL, build, random_batch
from numerics import assert_as_good_as_torch
from scipy.stats import spearmanr
from sweeps import slow
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
)

from pyglobenc import TransformerAttribution
from pyglobenc.methods.differentiable import attention_gradients, record_forward
from pyglobenc.methods.precision import reliability
from pyglobenc.methods.precision.reliability import NoRelevanceWarning, PrecisionWarning
from pyglobenc.methods.relevance.variants import PUBLISHED, VARIANTS


def state(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    parameters = [(p.data_ptr(), p._version, p.requires_grad, p.grad, p.dtype) for p in model.parameters()]
    return hooks, parameters, model.config._attn_implementation, model.training


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("frozen", [False, True])
def test_model_is_left_as_it_was(dtype, frozen):
    model = build("bert-classifier", torch.float32).requires_grad_(not frozen)
    before = state(model)
    batch = random_batch(model, batch=2, n=9, pads=[0, 2])
    ta = TransformerAttribution(model, dtype=dtype)
    for variant in VARIANTS:
        ta(**batch, variant=variant)
    assert state(model) == before
    with pytest.raises(ValueError, match="target must lie"):
        ta(**batch, target=9)
    assert state(model) == before
    handle = model.classifier.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ta(**batch)
    handle.remove()
    assert state(model) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_don_t_matter(mode):
    model, cases = chefer_golden("chefer_vit")
    batch, target, _, published = cases[0]
    with mode():
        batch = {key: value.clone() for key, value in batch.items()}
        scores = TransformerAttribution(model)(**batch, target=target).scores
    assert relative(scores, published["transformer_attribution"]) <= 1e-10
    assert not scores.requires_grad


def used(n, **call):
    model = build("bert-classifier", torch.float32, max_position_embeddings=1600)
    ta = TransformerAttribution(model)
    batch = random_batch(model, batch=1, n=n, pads=[37])
    ta(**batch, **call)
    return measure_allocations(lambda: ta(**batch, **call))


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize(
    "variant",
    ["transformer_attribution", *map(slow, ("rollout", "last_layer_ablation", "attn_gradcam"))]
    + ["attention_rollout"],
)
def test_row_mode_is_linear(variant):
    small, large = (used(n, variant=variant, reliability="estimated") for n in (800, 1600))
    assert large.largest < 1600**2 * 4 / 4, "an n*n array of float32 would be larger"
    assert large.peak <= 2.1 * small.peak


def test_maps_never_hold_vectors():
    d, heads, depth, n = 48, 4, 3, 200
    assert used(n, maps=("map", "R_alpha")).largest <= depth * heads * n * n * 4 < n * n * d * 4


def random_case(seed):
    """A model of a random depth and weight scale, and a text of a random length."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    std = float(torch.exp(torch.empty(()).uniform_(-3.9, -1.2, generator=generator)))
    torch.manual_seed(seed)
    settings = SMALL | dict(
        num_hidden_layers=pick(2, 3, 4, 8), num_attention_heads=pick(2, 4, 8), initializer_range=std
    )
    model = BertForSequenceClassification(BertConfig(**settings)).eval()
    return model, {"input_ids": torch.randint(5, 97, (1, pick(6, 10, 16, 24, 32)), generator=generator)}


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("seeds", [range(25), slow(range(50)), slow(range(50, 150))], ids=str)
def test_reliability_tells_good_from_bad(monkeypatch, seeds):
    limits, true = {"measured": math.inf, "estimated": 0}, []
    said = {method: [] for method in limits}
    for seed in seeds:
        model, batch = random_case(seed)
        for method, below in limits.items():
            monkeypatch.setattr(reliability, "MEASURED_BELOW", {"cpu": below})
            result = TransformerAttribution(model)(**batch)
            assert result.error_method == method
            said[method].append(float(result.error))
        exact = TransformerAttribution(model, dtype=torch.float64)(
            **batch, target=result.target, reliability="off"
        ).scores
        true.append(relative(result.scores[:, 1:], exact[:, 1:]))
    for errors in said.values():
        assert spearmanr(errors, true).statistic >= 0.8
        ratio = torch.tensor(true) / torch.tensor(errors)
        assert 0.3 <= ratio.median() <= 3


def outliers(seed, dtype):
    """A random case whose LayerNorms have a few features with a huge beta, or with gammas of 0 or nearly 0,
    as trained models have.
    """
    model, batch = random_case(seed)
    generator, kind = torch.Generator().manual_seed(seed), seed % 4
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
            some = torch.randperm(norm.weight.numel(), generator=generator)[:4]
            norm.weight += 0.3 * torch.randn(norm.weight.shape, generator=generator)
            norm.bias += 0.3 * torch.randn(norm.bias.shape, generator=generator)
            if kind == 0:
                norm.bias[some] = 20.0
            elif kind == 1:
                norm.weight[some] = 0.0
            elif kind == 2:
                norm.weight[some] *= 1e-4
            else:
                norm.weight *= 0.01
    return model.to(dtype), batch


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize(
    "dtype, seeds",
    [(torch.float32, 16), (torch.bfloat16, 16)]
    + [slow(dtype, 32) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    ids=str,
)
def test_error_of_any_precision(dtype, seeds):
    """The median of true over said lies within a factor of 4, and at most a tenth of errors above four times
    the limit aren't said.
    """
    said, true = {"measured": [], "estimated": []}, []
    for seed in range(seeds):
        model, batch = outliers(seed, dtype)
        exact = TransformerAttribution(model, dtype=torch.float64)(
            **batch, target=0, reliability="off"
        ).scores
        for method, errors in said.items():
            result = TransformerAttribution(model)(**batch, target=0, reliability=method)
            errors.append(float(result.error))
        true.append(relative(result.scores[:, 1:], exact[:, 1:]))
    true = torch.tensor(true)
    for errors in map(torch.tensor, said.values()):
        assert errors.isfinite().all() and (errors > 0).all()
        assert 0.25 <= (true / errors).median() <= 4
        assert ((true > 4e-2) & (errors < 1e-2)).sum() <= seeds // 10


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**8])
def test_gradients_of_any_size_keep_their_digits_in_float16(factor):
    """A small logit has gradients below the smallest float16. Those of a large one can't be multiplied."""

    def gradients(dtype, factor):
        model = build("bert-classifier", torch.float16).to(dtype)
        with torch.no_grad():
            model.classifier.weight *= factor
        run = record_forward("test", model, batch)
        return torch.stack(attention_gradients(run.output.logits[:, 1], run, 0)).double() / factor

    batch = random_batch(build("bert-classifier", torch.float16), batch=2, n=16)
    exact, plain = gradients(torch.float64, 1.0), gradients(torch.float16, 1.0)
    assert_as_good_as_torch(gradients(torch.float16, factor), exact, plain)


def test_autocast_is_the_precision_of_the_forward_pass():
    model, batch = random_case(3)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(PrecisionWarning):
        measured, estimated = (
            TransformerAttribution(model)(**batch, reliability=how).error for how in ("measured", "estimated")
        )
    assert measured > 1e-3 and estimated > 1e-3


def test_an_unknown_error_warns():
    model = build("bert-classifier", torch.float32)
    with torch.no_grad():
        # nothing of the text comes through, and nothing moves
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight.zero_()
            norm.bias.zero_()
        model.bert.pooler.dense.bias.fill_(1.0)
    with pytest.warns((PrecisionWarning, NoRelevanceWarning)):
        result = TransformerAttribution(model)(**random_batch(model, batch=1, n=6), reliability="measured")
    assert result.error.isnan().all()


@pytest.mark.parametrize("method", ["measured", "estimated", "off"])
@pytest.mark.parametrize(
    "variant", [name for name, variant in VARIANTS.items() if variant.kind in ("rollout", "layer", "input")]
)
def test_no_relevance_says_so(variant, method):
    model = build("bert-classifier", torch.float32)
    batch = random_batch(model, batch=3, n=9, pads=[0, 3, 8])
    with torch.no_grad():
        # tanh of the pooler is positive, and class 1 has no positive contribution
        model.bert.pooler.dense.weight.mul_(1e-3)
        model.bert.pooler.dense.bias.fill_(1.0)
        model.classifier.weight[1] = -model.classifier.weight[1].abs()
    ta = TransformerAttribution(model)
    with pytest.warns(NoRelevanceWarning, match="2 of 3 examples"):
        result = ta(**batch, target=[1, 0, 1], variant=variant, reliability=method)
    if variant != "lrp" and variant != "lrp_last_layer":
        assert result.nothing.tolist() == [True, False, True]
        assert not result.scores[[0, 2]].any() and result.scores[1].any()
        assert method == "off" or result.error.isnan().tolist() == [True, False, True]
    ids = [
        row[mask.bool()].tolist()
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    with pytest.warns(NoRelevanceWarning):
        packed = ta.packed(input_ids=ids, target=[1, 0, 1], variant=variant, reliability="off")
    assert [bool(one.nothing) for one in packed] == result.nothing.tolist()
    assert not packed[0].scores.any() and not packed[2].scores.any() and packed[1].scores.any()


def test_a_text_of_one_token_has_relevance():
    model = build("bert-classifier", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoRelevanceWarning)
        result = TransformerAttribution(model)(**random_batch(model, batch=1, n=1), reliability="off")
    # Each of 3 layers divides 1 + a by 1 + a, in at most four rounded operations.
    assert abs(result.scores.item() - 1) <= 3 * 4 * 2.0**-24


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("name", ["bert-classifier", "distilbert"])
def test_estimate_is_an_example_s_own(name):
    model = build(name, torch.float32)
    batch = random_batch(model, batch=2, n=30, pads=[0, 11])
    alone = {key: value[1:, :19] for key, value in batch.items()}
    both, one = (
        TransformerAttribution(model)(**b, target=0, reliability="estimated").error for b in (batch, alone)
    )
    assert torch.allclose(both[1:], one, rtol=1e-2)


@pytest.mark.parametrize("variant", ["transformer_attribution", "last_layer", "full"])
def test_estimate_where_divisors_are_0(variant):
    model = build("bert-classifier", torch.float32)
    first, second, _ = model.bert.encoder.layer
    with torch.no_grad():
        for part in (first.attention.self.query, second.attention.self.value):
            part.weight[:12], part.bias[:12] = 0, 0
        # features 0 to 4 of the second layer's residual sums
        for part in (
            first.output.LayerNorm,
            second.attention.output.dense,
            second.attention.output.LayerNorm,
            second.output.dense,
        ):
            part.weight[:5], part.bias[:5] = 0, 0
    ta = TransformerAttribution(model, dtype=torch.float64)
    batch = random_batch(model, batch=2, n=30, pads=[0, 11])
    error = ta(**batch, variant=variant, reliability="estimated").error
    assert ((error > 0) & (error < 1e-6)).all()


def test_a_lost_result_warns_and_float64_steadies_it():
    model = build("bert-classifier", torch.float32, num_hidden_layers=12)
    batch = random_batch(model, batch=16, n=40)
    with pytest.warns(PrecisionWarning, match="float64"):
        TransformerAttribution(model)(**batch, variant="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrecisionWarning)
        result = TransformerAttribution(model, dtype=torch.float64)(**batch, variant="full")
    exact = TransformerAttribution(model.double())(**batch, variant="full", target=result.target).scores
    assert relative(result.scores, exact) <= 1e-6


def test_stabilizer_steadies_float32():
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**(SMALL | dict(num_hidden_layers=6, initializer_range=0.2)))
    ).eval()
    batch = random_batch(model, batch=8, n=24)

    def error(stabilizer):
        out = TransformerAttribution(model, stabilizer=stabilizer)(
            **batch, target=0, reliability="off"
        ).scores
        exact = TransformerAttribution(model, dtype=torch.float64, stabilizer=stabilizer)(
            **batch, target=0
        ).scores
        return relative(out[:, 1:], exact[:, 1:])

    assert error(0.1) < 0.1 * error(0.0)
    with pytest.raises(ValueError, match="stabilizer"):
        TransformerAttribution(model, stabilizer=-1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(variant="lime"), "variant must be one of"),
        (dict(start_layer=3), "start_layer must lie in"),
        (dict(start_layer=True), "start_layer must be an integer"),
        (dict(target="end"), "target must be a class index"),
        (dict(target=[0, 1, 0]), "one integer or one for each of 2"),
        (dict(target=0.5), "must be integers"),
        (dict(position=1), "one set of logits"),
        (dict(maps="map"), "maps must be a sequence"),
        (dict(maps=["norms"]), "maps must be a sequence"),
        (dict(reliability="maybe"), "reliability must be one of"),
        (dict(input_ids=None), "input_ids"),
    ],
)
def test_refusals(call, message):
    model = build("bert-classifier")
    with pytest.raises((ValueError, TypeError), match=message):
        TransformerAttribution(model)(**(random_batch(model, batch=2, n=6) | call))


def test_refused_models():
    with pytest.raises(ValueError, match="no head to explain"):
        TransformerAttribution(BertModel(BertConfig(**SMALL)).eval())(input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="in parallel, cls_classifier and distillation_classifier"):
        model = DeiTForImageClassificationWithTeacher(DeiTConfig(**IMAGE)).eval()
        TransformerAttribution(model)(pixel_values=torch.randn(1, 3, 12, 12))
    with pytest.raises(ValueError, match="training mode"):
        model = build("bert-classifier").train()
        TransformerAttribution(model)(**random_batch(model, batch=1, n=5))
    vit, _ = chefer_golden("chefer_vit")
    with pytest.raises(ValueError, match="pixel_values"):
        TransformerAttribution(vit)(pixel_values=torch.ones(3, 32, 32))


def test_published_names_are_variants():
    model = build("bert-classifier")
    batch = random_batch(model, batch=1, n=6)
    ta = TransformerAttribution(model)
    for name, variant in PUBLISHED.items():
        assert torch.equal(ta(**batch, variant=name).scores, ta(**batch, variant=variant).scores)


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("name, target", [("bert-classifier", [1, 0]), ("distilbert", None), ("vit", None)])
def test_measuring_changes_nothing_else(name, target):
    model = build(name)
    call, batch = TransformerAttribution(model), random_batch(model, batch=2, n=12, pads=[0, 4])
    wanted = dict(**batch, target=target, layers=True, maps=["map", "R_in"], output_hidden_states=True)
    alone, measured = (call(**wanted, reliability=how) for how in ("off", "measured"))
    assert alone.error is None and measured.error.shape == (2,) and (measured.error < 1e-6).all()
    assert torch.equal(alone.target, measured.target) and torch.equal(alone.position, measured.position)
    for one, other in [
        *((getattr(alone, field), getattr(measured, field)) for field in ("scores", "logit", "relevance")),
        *((alone.maps[key], measured.maps[key]) for key in ("map", "R_in")),
        *((alone.diagnostics[key], measured.diagnostics[key]) for key in ("relevance_sums", "conservation")),
        *zip(alone.output.hidden_states, measured.output.hidden_states, strict=True),
    ]:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)

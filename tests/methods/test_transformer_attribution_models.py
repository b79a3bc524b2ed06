"""Transformer attribution on random models of every known architecture and head, against the rules on
materialised arrays.
"""

import pytest
import torch
import transformers
from chefer import LRP, direct, relative
from models import DISTILBERT, SMALL, build, random_batch, randomize

from pyglobenc import TransformerAttribution
from pyglobenc.methods.precision import reliability

BERT = SMALL | dict(num_labels=4)
VIT = dict(
    image_size=24,
    patch_size=6,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=12,
    intermediate_size=80,
    num_labels=6,
)
VITS = {
    "vit": ("ViTConfig", "ViTForImageClassification"),
    "deit": ("DeiTConfig", "DeiTForImageClassification"),
}

# relative L2 in float64: rounding, amplified up to 1e6 times on random weights
TOLERANCE = 1e-8


def make(config, model, settings, attention="sdpa", dtype=torch.float64):
    config = getattr(transformers, config)(**settings)
    config._attn_implementation = attention
    return randomize(getattr(transformers, model)(config)).to(dtype).eval()


def linears(model, *paths):
    return [model.get_submodule(path) for path in paths]


CLASSIFIERS = {
    "bert": ("BertConfig", "BertForSequenceClassification", BERT, ("classifier", "bert.pooler.dense")),
    "bert-h12": (
        "BertConfig",
        "BertForSequenceClassification",
        BERT | dict(num_attention_heads=12, num_hidden_layers=5),
        ("classifier", "bert.pooler.dense"),
    ),
    "roberta": (
        "RobertaConfig",
        "RobertaForSequenceClassification",
        BERT,
        ("classifier.out_proj", "classifier.dense"),
    ),
    "electra": (
        "ElectraConfig",
        "ElectraForSequenceClassification",
        BERT | dict(embedding_size=32),
        ("classifier.out_proj", "classifier.dense"),
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        DISTILBERT | dict(num_labels=4),
        ("classifier", "pre_classifier"),
    ),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_padded_batch_equals_direct_rules_alone(name, attention):
    config, kind, settings, paths = CLASSIFIERS[name]
    model = make(config, kind, settings, attention)
    n, pads, targets = 11, [0, 4, 7], [2, 0, 3]
    batch = random_batch(model, batch=3, n=n, pads=pads)
    for start in (0, 1):
        result = TransformerAttribution(model)(**batch, target=targets, start_layer=start, layers=True)
        for b, (count, target) in enumerate(zip(pads, targets, strict=True)):
            alone = {
                "input_ids": batch["input_ids"][b : b + 1, : n - count],
                "attention_mask": torch.ones(1, n - count).long(),
            }
            head = linears(model, *paths)
            row = (head[0], head[0].weight[target].detach()[None])
            scores, r = direct(
                model, alone, lambda out, t=target: out.logits[0, t], [row, *head[1:]], start_layer=start
            )
            assert relative(result.scores[b, : n - count], scores) <= TOLERANCE
            assert not result.scores[b, n - count :].any()
            assert relative(result.relevance[b, 0, : n - count], r.sum(-1)) <= TOLERANCE
            assert not result.relevance[b, 0, n - count :].any()
    assert result.diagnostics["conservation"].max() <= 1e-6


@pytest.mark.parametrize("name", VITS)
def test_images_equal_direct_rules(name):
    model = make(*VITS[name], VIT)
    pixels = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    result = TransformerAttribution(model)(pixel_values=pixels, target=[1, 5, 0], start_layer=1, layers=True)
    prefix = 1 if name == "vit" else 2
    assert result.scores.shape == (3, 16)
    for b, target in enumerate([1, 5, 0]):
        row = (model.classifier, model.classifier.weight[target].detach()[None])
        scores, r = direct(
            model,
            {"pixel_values": pixels[b : b + 1]},
            lambda out, t=target: out.logits[0, t],
            [row],
            start_layer=1,
        )
        assert relative(result.scores[b], scores[prefix:]) <= TOLERANCE
        assert relative(result.relevance[b, 0], r.sum(-1)) <= TOLERANCE


def test_the_error_of_images_is_measured(monkeypatch):
    monkeypatch.setattr(reliability, "MEASURED_BELOW", {"cpu": 0})
    model = build("vit", torch.float32)
    batch = random_batch(model, 2, 10)
    attribute = TransformerAttribution(model)
    assert attribute(**batch).error_method == "measured"
    torch.testing.assert_close(attribute(**batch).error, attribute(**batch, reliability="measured").error)
    text = build("bert-classifier", torch.float32)
    assert TransformerAttribution(text)(**random_batch(text, 1, 6)).error_method == "estimated"


def test_contrast_explains_the_difference_of_two_logits():
    model = build("bert-classifier", num_labels=4)
    batch = random_batch(model, batch=1, n=9)
    result = TransformerAttribution(model)(**batch, target=3, contrast=1)
    head = linears(model, "classifier", "bert.pooler.dense")
    weight = model.classifier.weight.detach()
    scores, _ = direct(
        model,
        batch,
        lambda out: out.logits[0, 3] - out.logits[0, 1],
        [(head[0], (weight[3] - weight[1])[None]), head[1]],
    )
    assert relative(result.scores[0], scores) <= TOLERANCE
    assert result.logit == result.output.logits[0, 3] - result.output.logits[0, 1]
    with pytest.raises(ValueError, match="another class"):
        TransformerAttribution(model)(**batch, target=3, contrast=3)


TOKEN_HEADS = {
    "token": ("BertConfig", "BertForTokenClassification", BERT, ("classifier",)),
    "masked": (
        "BertConfig",
        "BertForMaskedLM",
        SMALL,
        ("cls.predictions.decoder", "cls.predictions.transform.dense"),
    ),
    "masked-roberta": ("RobertaConfig", "RobertaForMaskedLM", SMALL, ("lm_head.decoder", "lm_head.dense")),
    "masked-distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        DISTILBERT,
        ("vocab_projector", "vocab_transform"),
    ),
}


@pytest.mark.parametrize("name", TOKEN_HEADS)
def test_a_token_s_logit(name):
    config, kind, settings, paths = TOKEN_HEADS[name]
    model = make(config, kind, settings)
    batch = random_batch(model, batch=2, n=9)
    result = TransformerAttribution(model)(**batch, target=2, position=[4, 6])
    for b, position in enumerate([4, 6]):
        head = linears(model, *paths)
        row = (head[0], head[0].weight[2].detach()[None])
        alone = {key: value[b : b + 1] for key, value in batch.items()}
        scores, _ = direct(
            model, alone, lambda out, p=position: out.logits[0, p, 2], [row, *head[1:]], position=position
        )
        assert relative(result.scores[b], scores) <= TOLERANCE
    assert (result.target == 2).all() and result.position.tolist() == [4, 6]
    with pytest.raises(ValueError, match="name the token"):
        TransformerAttribution(model)(**batch, target=2)


@pytest.mark.parametrize("which", ["start", "end"])
def test_a_span_s_logit(which):
    model = make("BertConfig", "BertForQuestionAnswering", SMALL)
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    result = TransformerAttribution(model)(**batch, target=which)
    logits = result.output[f"{which}_logits"].masked_fill(batch["attention_mask"] == 0, float("-inf"))
    assert torch.equal(result.position, logits.argmax(-1)) and torch.equal(result.logit, logits.amax(-1))
    head = model.qa_outputs
    row = (head, head.weight[["start", "end"].index(which)].detach()[None])
    position = int(result.position[0])
    alone = {key: value[:1] for key, value in batch.items()}
    scores, _ = direct(
        model, alone, lambda out: out[f"{which}_logits"][0, position], [row], position=position
    )
    assert relative(result.scores[0], scores) <= TOLERANCE
    at = TransformerAttribution(model)(**batch, target=which, position=5).position
    assert at.tolist() == [5, 5]
    with pytest.raises(ValueError, match="padding token"):
        TransformerAttribution(model)(**batch, target=which, position=7)


def test_a_choice_s_logit():
    model = make("BertConfig", "BertForMultipleChoice", SMALL)
    choices = random_batch(model, batch=6, n=9)
    batch = {key: value.unflatten(0, (2, 3)) for key, value in choices.items()}
    ta = TransformerAttribution(model)
    predicted = model(**batch).logits.argmax(-1)
    assert torch.equal(ta(**batch).scores, ta(**batch, target=predicted).scores)
    result = ta(**batch, target=[2, 0])
    head = linears(model, "classifier", "bert.pooler.dense")
    row = (head[0], head[0].weight.detach())
    for b, choice in enumerate([2, 0]):
        alone = {key: value[b : b + 1, choice : choice + 1] for key, value in batch.items()}
        scores, _ = direct(model, alone, lambda out: out.logits[0, 0], [row, head[1]])
        assert relative(result.scores[b], scores) <= TOLERANCE


def test_gradcam_of_a_padded_example_is_that_of_the_example_alone():
    model = build("bert-classifier", num_labels=4)
    batch = random_batch(model, batch=2, n=12, pads=[0, 5])
    ta = TransformerAttribution(model)
    together = ta(**batch, target=1, variant="attn_gradcam").scores
    alone = ta(input_ids=batch["input_ids"][1:, :7], target=1, variant="attn_gradcam").scores
    assert relative(together[1, :7], alone[0]) <= TOLERANCE and not together[1, 7:].any()


@pytest.mark.parametrize("variant", ["attn_gradcam", "attention_rollout", "lrp", "lrp_last_layer"])
def test_variants_of_images_and_pads(variant):
    model = make("ViTConfig", "ViTForImageClassification", VIT | dict(num_channels=1))
    pixels = torch.randn(2, 1, 24, 24, dtype=torch.float64)
    ta = TransformerAttribution(model)
    together = ta(pixel_values=pixels, target=1, variant=variant).scores
    alone = ta(pixel_values=pixels[1:], target=1, variant=variant).scores
    assert relative(together[1:], alone) <= TOLERANCE
    assert together.shape == ((2, 24, 24) if variant == "lrp" else (2, 16))


def test_lrp_baseline_equals_its_rules():
    model = build("bert-classifier", num_labels=4)
    batch = random_batch(model, batch=1, n=9)
    head = linears(model, "classifier", "bert.pooler.dense")
    row = (head[0], head[0].weight[1].detach()[None])
    _, r = direct(model, batch, lambda out: out.logits[0, 1], [row, head[1]], rules=LRP)
    assert (
        relative(TransformerAttribution(model)(**batch, target=1, variant="lrp").scores[0], r.sum(-1))
        <= TOLERANCE
    )

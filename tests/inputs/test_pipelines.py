"""Pipelines of transformers in place of a model and its tokenizer or image processor."""

import numpy as np
import pytest
import torch
from models import build
from PIL import Image
from tiny import VOCABULARY, classifier, tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    TextClassificationPipeline,
    ViTImageProcessor,
    pipeline,
)

from pyglobenc import (
    evaluate,
    explain,
    explain_generation,
    explain_image,
    explain_layers,
    explain_similarity,
)
from pyglobenc.evaluate.correlation import layer_correlations

TEXT, LONG = "the good film", "the good film. a deep one, filming. a good deep film"
CONFIG = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=40,
    id2label={0: "entailment", 1: "neutral", 2: "contradiction"},
    label2id={"entailment": 0, "neutral": 1, "contradiction": 2},
)


def made(task, model, **settings):
    return pipeline(task, model=model, tokenizer=tokenizer(), device="cpu", **settings)


def classifying(**settings):
    return made("text-classification", classifier(), **settings)


def seeing():
    processor = ViTImageProcessor(size={"height": 12, "width": 12})
    return pipeline("image-classification", model=build("vit"), image_processor=processor, device="cpu")


def writing(**settings):
    model = build("llama", vocab_size=len(VOCABULARY))
    return made("text-generation", model, **settings)


def bert(kind):
    torch.manual_seed(0)
    return kind(BertConfig(**CONFIG)).double().eval()


def assert_same(one, other):
    assert np.array_equal(one.scores, other.scores) and one.tokens == other.tokens


def test_a_pipeline_stands_for_its_model_and_tokenizer():
    pipe = classifying()
    model, tok = pipe.model, pipe.tokenizer
    alone = explain(model, tok, TEXT, "gradient-x-input", target="GOOD")
    assert alone.settings["device"] == str(pipe.device)
    for found in (
        explain(pipe, TEXT, "gradient-x-input", target="GOOD"),
        explain(model=pipe, text=TEXT, method="gradient-x-input", target="GOOD"),
        explain(pipe, text=TEXT, method="gradient-x-input", target="GOOD"),
        explain(pipe, tok, TEXT, "gradient-x-input", target="GOOD"),
    ):
        assert_same(found, alone)
    # The label is that of the pipeline.
    (answer,) = pipe(TEXT)
    a = explain(pipe, TEXT)
    assert (a.label, a.probability) == (answer["label"], pytest.approx(answer["score"], rel=1e-6))
    texts = [TEXT, (TEXT, LONG)]
    several = (explain(*one, texts, progress=False) for one in ((pipe,), (model, tok)))
    for one, other in zip(*several, strict=True):
        assert_same(one, other)


def test_every_function_of_a_model_and_a_tokenizer_takes_a_pipeline():
    pipe = classifying()
    model, tok = pipe.model, pipe.tokenizer
    assert np.array_equal(explain_layers(pipe, TEXT).scores, explain_layers(model, tok, TEXT).scores)
    options = dict(methods=["globenc"], metrics=["comprehensiveness"], progress=False)
    for given in ((pipe, [TEXT, LONG]), (pipe, tok, [TEXT, LONG])):
        found, wanted = evaluate(*given, **options), evaluate(model, tok, [TEXT, LONG], **options)
        assert str(found) == str(wanted)
    options = dict(methods=["globenc"], max_length=40, progress=False)
    found, wanted = (layer_correlations(*one, [TEXT, LONG], **options) for one in ((pipe,), (model, tok)))
    assert np.array_equal(found["globenc"].layers, wanted["globenc"].layers)
    encoder = made("feature-extraction", model.base_model)
    found = explain_similarity(encoder, TEXT, LONG, pooling="mean")
    wanted = explain_similarity(model.base_model, tok, TEXT, LONG, pooling="mean")
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)


def test_a_pipeline_that_fills_a_mask_names_tokens_or_writes():
    fill = made("fill-mask", bert(BertForMaskedLM))
    text = "the [MASK] film"
    a = explain(fill, text, "gradient-x-input")
    assert_same(a, explain(fill.model, fill.tokenizer, text, "gradient-x-input"))
    assert a.target == fill(text)[0]["token"]
    names = made("token-classification", bert(BertForTokenClassification))
    assert_same(explain(names, TEXT, target=1), explain(names.model, names.tokenizer, TEXT, target=1))
    with pytest.raises(ValueError, match="logits for every token"):
        explain(names, TEXT, "gradient-x-input")
    write = writing(max_new_tokens=3, do_sample=False)
    a = explain_generation(write, TEXT)
    assert_same(a, explain_generation(write.model, write.tokenizer, TEXT, max_new_tokens=3))
    (wrote,) = write(TEXT, return_tensors=True)
    assert wrote["generated_token_ids"] == a.token_ids
    assert_same(explain(write, TEXT, "attnlrp"), explain(write.model, write.tokenizer, TEXT, "attnlrp"))
    assert len(explain_generation(write, TEXT, max_new_tokens=2)) == 2


def test_a_zero_shot_pipeline_explains_a_pair():
    zero = made("zero-shot-classification", bert(BertForSequenceClassification))
    pair = (TEXT, "a film.")
    options = dict(method="gradient-x-input", target="entailment")
    assert_same(explain(zero, pair, **options), explain(zero.model, zero.tokenizer, pair, **options))
    for text in (TEXT, [pair, TEXT]):
        with pytest.raises(ValueError, match="explain: a zero-shot pipeline reads each text with a hypoth"):
            explain(zero, text)


def test_an_image_pipeline_stands_for_its_model_and_processor():
    pipe = seeing()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    wanted = explain_image(pipe.model, pipe.image_processor, image)
    for found in (explain_image(pipe, image), explain_image(model=pipe, image=image)):
        assert found.scores.keys() == wanted.scores.keys()
        assert all(np.array_equal(found.scores[key], wanted.scores[key]) for key in wanted.scores)
    best = pipe(image)[0]
    label = pipe.model.config.id2label[wanted.predicted]
    assert label == best["label"] and wanted.probabilities.max() == pytest.approx(best["score"], rel=1e-5)
    options = dict(methods=["gradient-x-input"], metrics=["comprehensiveness"], progress=False)
    found = evaluate(pipe, images=[image], **options)
    assert str(found) == str(evaluate(pipe.model, images=[image], processor=pipe.image_processor, **options))


def test_truncation_is_the_pipelines():
    pipe = classifying(truncation=True, max_length=9, padding=True)
    found = explain(pipe, LONG)
    assert_same(found, explain(pipe.model, pipe.tokenizer, LONG, long="truncate", max_length=9))
    assert len(found.tokens) == 9 and found.cut
    # The call's own options go before those of the pipeline.
    with pytest.raises(ValueError, match="9 fit"):
        explain(pipe, LONG, long="error")
    assert len(explain(pipe, LONG, max_length=12).tokens) == 12
    with pytest.raises(ValueError, match="fit"):
        explain(classifying(), " ".join([LONG] * 4))
    # max_length alone doesn't cut in transformers.
    assert_same(explain(classifying(max_length=4), LONG), explain(pipe.model, pipe.tokenizer, LONG))
    fill = made("fill-mask", bert(BertForMaskedLM), tokenizer_kwargs=dict(truncation=True, max_length=5))
    assert len(explain(fill, "[MASK] film. a b c d", "saliency").tokens) == 5


@pytest.mark.parametrize(
    ("function", "made_pipeline", "message"),
    [
        (explain, lambda: classifying(truncation="only_second"), "truncation='only_second'"),
        (explain, lambda: classifying(add_special_tokens=False), "add_special_tokens=False"),
        (explain_layers, lambda: classifying(truncation=True, max_length=9), "truncation=True, max_length=9"),
        (
            explain_generation,
            lambda: writing(do_sample=True, top_k=3),
            "do_sample=True.*give its text",
        ),
        (explain_generation, lambda: writing(truncation=True), "truncation=True"),
        (explain_generation, lambda: writing(prefix="a "), "prefix='a '"),
        (explain, lambda: made("fill-mask", bert(BertForMaskedLM), targets=["film"]), "targets of its own"),
        (
            explain,
            lambda: made("ner", bert(BertForTokenClassification), aggregation_strategy="first", stride=2),
            "stride=2",
        ),
    ],
)
def test_a_setting_that_cant_be_honoured_is_refused(function, made_pipeline, message):
    with pytest.raises(ValueError, match=f"{function.__name__}: .*{message}"):
        function(made_pipeline(), TEXT)


def test_a_given_answer_needs_no_settings_of_generation():
    write = writing(do_sample=True, top_k=3)
    found = explain_generation(write, TEXT, answer="good")
    assert_same(found, explain_generation(write.model, write.tokenizer, TEXT, answer="good"))


def test_left_truncation_is_refused():
    pipe = classifying(truncation=True)
    pipe.tokenizer.truncation_side = "left"
    with pytest.raises(ValueError, match="truncation=True"):
        explain(pipe, LONG)


def test_other_pipelines_are_refused_by_name():
    class Own(TextClassificationPipeline):
        pass

    own = Own(model=classifier(), tokenizer=tokenizer(), device="cpu")
    for function, pipe in ((explain, own), (explain, seeing()), (explain_image, classifying())):
        name = type(pipe).__name__
        with pytest.raises(TypeError, match=f"{function.__name__}: can't tell how a {name} prepares"):
            function(pipe, TEXT)

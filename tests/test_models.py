import pytest
import torch
from tiny import minilm

from pyglobenc.models import HEAD
from pyglobenc.models.pretrained import SENTIMENT, load_pretrained


def test_sentiment_head_reads_a_film_review():
    minilm()  # skips where the package isn't installed
    model, tokenizer = load_pretrained(SENTIMENT, device="cpu")
    assert not model.training and model.config.id2label == {0: "negative", 1: "positive"}
    texts = ["A wonderful, moving and funny film.", "A dull, lifeless and boring mess."]
    with torch.no_grad():
        predicted = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1)
    assert predicted.tolist() == [1, 0]
    assert HEAD.stat().st_size < 8192


def test_transformer_attribution_explains_it():
    minilm()
    from pyglobenc import explain

    model, tokenizer = load_pretrained(SENTIMENT, device="cpu")
    a = explain(
        model,
        tokenizer,
        "A wonderful, moving and funny film.",
        method="transformer-attribution",
        progress=False,
    )
    words = dict(zip(a.tokens, a.scores.tolist(), strict=True))
    assert a.label == "positive"
    # The encoder is frozen, so the subject may rank as high as the praise.
    assert max((token for token in words if token[0] != "["), key=words.get) in (
        "wonderful",
        "moving",
        "funny",
        "film",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_in_the_dtype_asked_for(dtype):
    minilm()
    model, _ = load_pretrained(SENTIMENT, dtype, "cpu")
    assert {p.dtype for p in model.parameters()} == {dtype}

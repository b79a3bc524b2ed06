"""Texts in batches, packed or in windows get the same labels, probabilities and scores as each text alone."""

from functools import cache
from itertools import cycle, product

import pytest
import torch
import transformers
from models import ARCHITECTURES, PRE_NORM, randomize
from sweeps import sweep
from tiny import tokenizer

from pyglobenc import GlobEnc, explain
from pyglobenc.hf.labels import predict
from pyglobenc.inputs.windows import encode
from pyglobenc.scale.corpus.job import make_runner

# The texts have several lengths. [PAD] is token 0, # is the unknown token 1, and each text ends with [SEP].
TEXTS = ["a", "# the [SEP] film [PAD] good", "deep # [PAD]", "the [PAD] [SEP] #"]
LONG = ["the deep good film a b c # " * 3 + "[PAD] [PAD]", "a [PAD] b", "deep [SEP] # " * 5]
PADDING = {"[PAD]": 0, "#": 1, "[SEP]": 3}
KINDS = {
    config.removesuffix("Config"): (config, settings)
    for config, _, settings in (ARCHITECTURES | PRE_NORM).values()
}
# These models have eager attention only, which rounds probabilities to float32 even in a float64 model.
ROUNDED = {"Gemma2": dict(rtol=1e-4, atol=1e-4)}
UNPACKED = ("MPNet", "DebertaV2")


@cache
def classifier(kind, padding):
    config, settings = KINDS[kind]
    changes = dict(pad_token_id=padding, num_labels=3)
    if kind == "Gemma3Text":
        # The last entry of KINDS is an encoder.
        changes |= dict(use_bidirectional_attention=False)
    config = getattr(transformers, config)(**(settings | changes))
    config._attn_implementation = "eager" if kind in (*ROUNDED, *UNPACKED) else "sdpa"
    # torch has no grouped product of float64 for a mixture of experts
    config._experts_implementation = "eager"
    return randomize(getattr(transformers, f"{kind}ForSequenceClassification")(config)).double().eval()


def tok(**changes):
    """Return a tokenizer that pads on the left, with another token than the model."""
    return tokenizer(padding_side="left", pad_token="[MASK]", **changes)


def check(found, texts, model, close):
    for a, text in zip(found, texts, strict=True):
        ids = torch.tensor([encode(tok(), text, "text", None).inputs["input_ids"]])
        with torch.no_grad():
            expected = predict(model.config, model(input_ids=ids).logits[0])
        assert a["label"] == expected.label, text
        assert a["probability"] == pytest.approx(expected.probability, rel=close.get("rtol", 1e-9))
        scores = GlobEnc(model)(input_ids=ids, targets=[a["target"]]).scores[0, 0]
        torch.testing.assert_close(torch.tensor(a["scores"]), scores, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "kind, padding",
    sweep(product(KINDS, PADDING.values()), zip(KINDS, cycle(PADDING.values()), strict=False)),
)
def test_batches_and_packed_texts(kind, padding):
    model, close = classifier(kind, padding), ROUNDED.get(kind, {})
    check([vars(a) for a in explain(model, tok(), TEXTS, batch_size=4, progress=False)], TEXTS, model, close)
    if kind in UNPACKED:
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            make_runner(model, tok(), packed=True)
        return
    runner = make_runner(model, tok(), packed=True)
    check(runner.run([encode(tok(), text, "text", None) for text in TEXTS]), TEXTS, model, close)


@pytest.mark.parametrize("kind", KINDS)
def test_windows(kind):
    model, options = classifier(kind, 0), dict(long="windows", max_length=9, stride=4, progress=False)
    for a, text in zip(explain(model, tok(), LONG, batch_size=5, **options), LONG, strict=True):
        one = encode(tok(), text, "text", 9, "windows", 4)
        with torch.no_grad():
            logits = [
                model(input_ids=torch.tensor([[one.inputs["input_ids"][i] for i in w]])).logits[0]
                for w in one.windows
            ]
            if len(one.windows) > 1:
                # Only windows that contain the target count.
                logits = [row for row, window in zip(logits, one.windows, strict=True) if a.target in window]
        expected = predict(model.config, torch.stack(logits).mean(0))
        close = ROUNDED.get(kind, {}).get("rtol", 1e-9)
        assert a.label == expected.label and a.probability == pytest.approx(expected.probability, rel=close)


@pytest.mark.parametrize("kind", ["Bert", "ModernBert", "GPT2", "Llama"])
@pytest.mark.parametrize("padding", [None, -1])
def test_without_a_padding_id_texts_go_one_by_one(kind, padding):
    if padding == -1:
        model = classifier(kind, 0)
        # An id without an embedding can only be set afterwards.
        model.config.pad_token_id = padding
    else:
        model = classifier(kind, None)
    try:
        check(
            [vars(a) for a in explain(model, tok(), TEXTS, batch_size=4, progress=False)],
            TEXTS,
            model,
            ROUNDED.get(kind, {}),
        )
    finally:
        classifier.cache_clear()


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Gemma2"])
def test_padding_that_the_head_would_read_is_refused(kind):
    model, ids = classifier(kind, 0), torch.tensor([[5, 6, 7], [8, 9, 3]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(
        ValueError,
        match=f"{kind}ForSequenceClassification pads with the token 0, so its head would read padding here",
    ):
        GlobEnc(model)(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="would read padding"):
        GlobEnc(model)(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    GlobEnc(model)(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)
    GlobEnc(model)(input_ids=ids.flip(1), attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="config of .* has no pad_token_id"):
        GlobEnc(classifier(kind, None)).packed(input_ids=ids.tolist())

"""Packed sequences get the scores that they have in a padded batch."""

import pytest
import torch
from models import build
from numerics import assert_as_good_as_torch
from torch.nn.utils.rnn import pad_sequence

from pyglobenc import GlobEnc
from pyglobenc.hf.attention import PACKED, RECORDERS
from pyglobenc.methods.family import METHODS, Rollout

# unsorted, two of one length, one of one token
LENGTHS = (7, 3, 12, 3, 1, 20)
ARCHITECTURES = ("bert", "roberta", "electra", "albert-groups", "modernbert", "gpt2", "llama", "qwen2", "gemma2")


def sequences():
    """Token ids of every sequence, and the same as a padded batch."""
    ids = [torch.randint(5, 97, (n,)) for n in LENGTHS]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return [row.tolist() for row in ids], dict(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask)


def check(found, batch):
    """Results of every sequence against those of the padded batch."""
    for s, (n, one) in enumerate(zip(LENGTHS, found, strict=True)):
        torch.testing.assert_close(one.scores[0], batch.scores[s, :, :n], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.log_scale[0], batch.log_scale[s], rtol=1e-9, atol=1e-9)
        if batch.layer_scores is not None:
            torch.testing.assert_close(one.layer_scores[0], batch.layer_scores[s, :, :, :n], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one.layer_log_scale[0], batch.layer_log_scale[s], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_padded_batch(name):
    globenc = GlobEnc(build(name))
    ids, padded = sequences()
    check(globenc.packed(input_ids=ids), globenc(**padded))
    targets = torch.stack([torch.randint(0, n, (2,)) for n in LENGTHS])
    check(globenc.packed(input_ids=ids, targets=targets, layers=True), globenc(**padded, targets=targets, layers=True))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "attention-flow"])
def test_the_family(method):
    rollout = Rollout(build("bert"), method)
    ids, padded = sequences()
    check(rollout.packed(input_ids=ids, layers=True), rollout(**padded, layers=True))


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_float32_is_as_good_as_the_padded_batch(name):
    model = build(name)
    ids, padded = sequences()
    exact = GlobEnc(model)(**padded)
    globenc = GlobEnc(model.float())
    found, batch = globenc.packed(input_ids=ids), globenc(**padded)
    scores = torch.cat([one.scores.flatten() for one in found])
    real = padded["attention_mask"].bool()[:, None]
    assert_as_good_as_torch(scores, exact.scores[real], batch.scores[real])
    assert_as_good_as_torch(torch.cat([one.log_scale for one in found]), exact.log_scale, batch.log_scale)


def test_segments_and_masks_of_a_tokenizer():
    globenc = GlobEnc(build("bert"))
    ids, padded = sequences()
    types = [[int(i > 1) for i in range(n)] for n in LENGTHS]
    ones = [[1] * n for n in LENGTHS]
    padded["token_type_ids"] = pad_sequence([torch.tensor(row) for row in types], batch_first=True)
    check(globenc.packed(input_ids=ids, token_type_ids=types, attention_mask=ones, targets=[0]), globenc(**padded, targets=[0]))
    check(globenc.packed(input_ids=[torch.tensor(row) for row in ids], token_type_ids=types), globenc(**padded))


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit", "takes pixel_values, which can't be packed"),
        ("mpnet", "MPNetModel computes attention itself and can't keep packed sequences apart"),
        ("deberta-v3", "DebertaV2ForSequenceClassification computes attention itself and can't keep packed sequences apart"),
    ],
)
def test_models_that_cannot(name, message):
    globenc = GlobEnc(build(name))
    with pytest.raises(ValueError, match=message):
        globenc.packed(input_ids=[[5, 6], [7]])


def test_a_model_without_positions(monkeypatch):
    model = build("distilbert")
    forward = type(model.base_model).forward
    monkeypatch.setattr(type(model.base_model), "forward", lambda self, input_ids, **kwargs: forward(self, input_ids, **kwargs))
    with pytest.raises(ValueError, match="DistilBertModel takes no position_ids"):
        GlobEnc(model).packed(input_ids=[[5, 6], [7]])


def test_wrong_input():
    globenc = GlobEnc(build("bert"))
    ids = [[5, 6, 7], [8]]
    for batch in (dict(), dict(input_ids=torch.tensor([[5, 6]])), dict(input_ids=[5, 6]), dict(input_ids=[[5], []]), dict(input_ids=[])):
        with pytest.raises(TypeError, match="GlobEnc: input_ids must be a list of lists of token ids"):
            globenc.packed(**batch)
    for options, message in (
        (dict(attention_mask=[[1, 1, 0], [1]]), "attention_mask has zeros"),
        (dict(token_type_ids=[[0, 0], [0]]), "token_type_ids must be as long as input_ids"),
        (dict(targets=[1]), "targets must lie in .0, n., n the tokens of their sequence, the shortest 1"),
        (dict(targets=[[0], [0], [0]]), "T positions or .B, T. with B=2"),
        (dict(stage="N_Out"), "stage must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            globenc.packed(input_ids=ids, **options)
    with pytest.raises(TypeError, match="targets must be integers"):
        globenc.packed(input_ids=ids, targets=[0.5])
    with pytest.raises(ValueError, match="a sequence has 41 tokens and the model takes 40"):
        globenc.packed(input_ids=[[5] * 41])
    with pytest.raises(ValueError, match="attention-flow reads whole matrices"):
        Rollout(globenc.model, "attention-flow").packed(input_ids=ids)
    with pytest.raises(ValueError, match="training mode"):
        GlobEnc(build("bert").train()).packed(input_ids=ids)


def test_nothing_is_left_behind():
    model = build("bert")
    globenc = GlobEnc(model)
    globenc.packed(input_ids=[[5, 6], [7]])
    with pytest.raises(IndexError):
        globenc.packed(input_ids=[[5, 6], [7]], token_type_ids=[[0, 0], [9]])
    layers = [layer.attention.self for layer in model.encoder.layer]
    assert not any(layer in PACKED or layer in RECORDERS for layer in layers)
    assert model.config._attn_implementation == "sdpa" and not model._forward_pre_hooks

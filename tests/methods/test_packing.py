"""Packed sequences get the scores that they have in a padded batch."""

import pytest
import torch
import transformers
from models import DECODER, PRE_NORM, build, randomize
from numerics import until_enough, with_scale
from torch.nn.utils.rnn import pad_sequence

from pyglobenc import GlobEnc
from pyglobenc.hf.trace.attention import RECORDERS
from pyglobenc.methods.rollout.baselines import ROLLOUTS, Rollout

# unsorted, two of one length, one of one token
LENGTHS = (7, 3, 12, 3, 1, 20)
ARCHITECTURES = "bert roberta electra albert-groups modernbert gpt2 llama qwen2 gemma2".split()
GPT2 = PRE_NORM["gpt2"][2]
CLASSIFIERS = ("bert-classifier", "roberta", "electra", "distilbert", "albert", "modernbert")


def sequences():
    """Token ids of every sequence, and the same as a padded batch."""
    ids = [torch.randint(5, 97, (n,)) for n in LENGTHS]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return [row.tolist() for row in ids], dict(
        input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask
    )


def check(found, batch):
    """Results of every sequence against those of the padded batch."""
    for s, (n, one) in enumerate(zip(LENGTHS, found, strict=True)):
        torch.testing.assert_close(one.scores[0], batch.scores[s, :, :n], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.log_scale[0], batch.log_scale[s], rtol=1e-9, atol=1e-9)
        if batch.layer_scores is not None:
            torch.testing.assert_close(
                one.layer_scores[0], batch.layer_scores[s, :, :, :n], rtol=1e-9, atol=1e-12
            )
            torch.testing.assert_close(one.layer_log_scale[0], batch.layer_log_scale[s], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_padded_batch(name):
    globenc = GlobEnc(build(name))
    ids, padded = sequences()
    check(globenc.packed(input_ids=ids), globenc(**padded))
    targets = torch.stack([torch.randint(0, n, (2,)) for n in LENGTHS])
    check(
        globenc.packed(input_ids=ids, targets=targets, layers=True),
        globenc(**padded, targets=targets, layers=True),
    )


def check_output(found, batch):
    """What a classifier returns for every sequence against the padded batch."""
    for s, one in enumerate(found):
        torch.testing.assert_close(one.output.logits, batch.output.logits[s : s + 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_s_head_reads_every_sequence(name):
    model = build(name)
    ids, padded = sequences()
    for method in (GlobEnc(model), Rollout(model, "attention-rollout")):
        found, batch = method.packed(input_ids=ids), method(**padded)
        check(found, batch)
        check_output(found, batch)
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("name, padding", [("GPT2", 0), ("Llama", 0), ("Llama", 11)])
def test_a_decoder_s_head_reads_the_last_token(name, padding):
    config = getattr(transformers, f"{name}Config")(
        **{"gpt2": GPT2, "llama": DECODER}[name.lower()] | dict(pad_token_id=padding)
    )
    model = randomize(getattr(transformers, f"{name}ForSequenceClassification")(config)).double().eval()
    ids, _ = sequences()
    # a text may end with the token that pads, which the model passes over
    ids[2] = [7, 8, padding, padding]
    globenc = GlobEnc(model)
    for row, one in zip(ids, globenc.packed(input_ids=ids), strict=True):
        alone = globenc(input_ids=torch.tensor([row]))
        torch.testing.assert_close(one.output.logits, alone.output.logits, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.scores, alone.scores, rtol=1e-9, atol=1e-12)


def test_no_other_head_is_run():
    found = GlobEnc(build("llama")).packed(input_ids=[[5, 6], [7]])
    assert all(one.output is None for one in found)


def test_a_head_reads_the_mean_of_every_sequence():
    globenc = GlobEnc(build("modernbert", classifier_pooling="mean"))
    ids, padded = sequences()
    found, batch = globenc.packed(input_ids=ids), globenc(**padded)
    check(found, batch)
    check_output(found, batch)
    check(found, globenc(**padded, targets="mean"))
    check(
        globenc.packed(input_ids=ids, targets="mean", layers=True),
        globenc(**padded, targets="mean", layers=True),
    )
    assert batch.targets is None and all(one.targets is None for one in found)


@pytest.mark.parametrize("method", [name for name in ROLLOUTS if name != "attention-flow"])
def test_the_family(method):
    rollout = Rollout(build("bert"), method)
    ids, padded = sequences()
    check(rollout.packed(input_ids=ids, layers=True), rollout(**padded, layers=True))


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_float32_is_as_good_as_the_padded_batch(name):
    exact_globenc, globenc = GlobEnc(build(name)), GlobEnc(build(name).float())
    for compare in until_enough():
        ids, padded = sequences()
        exact, found, batch = exact_globenc(**padded), globenc.packed(input_ids=ids), globenc(**padded)
        real = padded["attention_mask"].bool()[:, None]
        expected = with_scale(batch.scores, batch.log_scale, exact.log_scale)[real]
        scales = exact.log_scale.split(1)
        scores = [
            with_scale(one.scores, one.log_scale, scale).flatten()
            for one, scale in zip(found, scales, strict=True)
        ]
        compare(torch.cat(scores), exact.scores[real], expected)


def test_segments_and_masks_of_a_tokenizer():
    globenc = GlobEnc(build("bert"))
    ids, padded = sequences()
    types = [[int(i > 1) for i in range(n)] for n in LENGTHS]
    ones = [[1] * n for n in LENGTHS]
    padded["token_type_ids"] = pad_sequence([torch.tensor(row) for row in types], batch_first=True)
    check(
        globenc.packed(input_ids=ids, token_type_ids=types, attention_mask=ones, targets=[0]),
        globenc(**padded, targets=[0]),
    )
    check(
        globenc.packed(input_ids=[torch.tensor(row) for row in ids], token_type_ids=types), globenc(**padded)
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit", "takes pixel_values, which can't be packed"),
        ("mpnet", "MPNetModel computes attention itself and can't keep packed sequences apart"),
        (
            "deberta-v3",
            "DebertaV2ForSequenceClassification computes attention itself and can't keep packed sequences "
            "apart",
        ),
    ],
)
def test_models_that_cannot(name, message):
    globenc = GlobEnc(build(name))
    with pytest.raises(ValueError, match=message):
        globenc.packed(input_ids=[[5, 6], [7]])


def test_a_model_without_positions(monkeypatch):
    model = build("distilbert")
    forward = type(model.base_model).forward
    monkeypatch.setattr(
        type(model.base_model),
        "forward",
        lambda self, input_ids, **kwargs: forward(self, input_ids, **kwargs),
    )
    with pytest.raises(ValueError, match="DistilBertModel takes no position_ids"):
        GlobEnc(model).packed(input_ids=[[5, 6], [7]])


def test_wrong_input():
    globenc = GlobEnc(build("bert"))
    ids = [[5, 6, 7], [8]]
    for batch in (
        dict(),
        dict(input_ids=torch.tensor([[5, 6]])),
        dict(input_ids=[5, 6]),
        dict(input_ids=[[5], []]),
        dict(input_ids=[]),
    ):
        with pytest.raises(TypeError, match="GlobEnc: input_ids must be a list of lists of token ids"):
            globenc.packed(**batch)
    for options, message in (
        (dict(attention_mask=[[1, 1, 0], [1]]), "attention_mask has zeros"),
        (dict(token_type_ids=[[0, 0], [0]]), "token_type_ids must be as long as input_ids"),
        (dict(token_type_ids=[[0, 0, 0], [9]]), r"token_type_ids must lie in \[0, 2\), got 0 to 9"),
        (
            dict(position_ids=[[1, 2, 3], [1]]),
            "position_ids can't be honoured: packed sequences get the positions",
        ),
        (dict(output_hidden_states=True), "output_hidden_states can't be honoured"),
        (dict(targets=[1]), "targets must lie in .0, n. for a sequence of n tokens; the shortest has 1"),
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
    model = build("bert-classifier")
    globenc = GlobEnc(model)
    globenc.packed(input_ids=[[5, 6], [7]])
    handle = model.bert.encoder.layer[1].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        globenc.packed(input_ids=[[5, 6], [7]])
    handle.remove()
    table = model.bert.embeddings.position_embeddings
    assert not table._forward_pre_hooks
    layers = [layer.attention.self for layer in model.bert.encoder.layer]
    assert not any(layer in RECORDERS for layer in layers)
    assert (
        model.config._attn_implementation == "sdpa"
        and not model._forward_pre_hooks
        and "forward" not in vars(model.bert)
    )

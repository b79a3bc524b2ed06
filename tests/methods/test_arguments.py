"""Every keyword argument of a call is honoured or refused by name; none is swallowed."""

import pytest
import torch
import transformers
from models import ARCHITECTURES, IMAGES, PRE_NORM, SMALL, build, random_batch
from tiny import tokenizer

from pyglobenc import GlobEnc, Rollout, TransformerAttribution, explain, explain_image
from pyglobenc.hf import capture

TEXT_MODELS = ARCHITECTURES | PRE_NORM
TOKEN_TYPES = ("bert", "roberta", "electra", "albert", "deberta-v3", "gpt2")
METHODS = (GlobEnc, Rollout, TransformerAttribution)


def inputs(n=5):
    return {"input_ids": torch.randint(5, 97, (2, n))}


@pytest.mark.parametrize(
    "wrong, near",
    [
        (dict(layer=True), "layers"),
        (dict(head_mask=None), "attention_mask"),
        (dict(encoder_hidden_states=None), "output_hidden_states"),
        (dict(token_type_id=torch.zeros(1)), "token_type_ids"),
        (dict(attention_masks=1), "attention_mask"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(wrong, near):
    model, name = build("bert-classifier"), next(iter(wrong))
    for method in (method(model) for method in METHODS):
        with pytest.raises(TypeError, match=f"{type(method).__name__}: takes no {name}; did you mean {near}"):
            method(**inputs(), **{name: torch.ones(1) if wrong[name] is None else wrong[name]})
    # a packed call's own names are fewer
    for method in (method(model) for method in METHODS):
        with pytest.raises(TypeError, match=f"{type(method).__name__}: takes no {name}; "):
            method.packed(input_ids=[[5, 6]], **wrong)


def test_names_of_another_method():
    model, batch = build("bert-classifier"), inputs()
    with pytest.raises(TypeError, match=r"GlobEnc: takes no target; did you mean targets\?"):
        GlobEnc(model)(**batch, target=1)
    with pytest.raises(TypeError, match=r"TransformerAttribution: takes no targets; did you mean target\?"):
        TransformerAttribution(model)(**batch, targets=[1])
    with pytest.raises(TypeError, match=r"Rollout: takes no maps_; did you mean maps\?"):
        Rollout(model)(**batch, maps_=())


@pytest.mark.parametrize("maps", ["map", ("map", 3), (None,), None, 3, [[]]], ids=str)
def test_maps_that_are_no_names(maps):
    for method in METHODS:
        with pytest.raises(ValueError, match=f"{method.__name__}: maps must be a sequence of names"):
            method(build("bert-classifier"))(**inputs(), maps=maps)


@pytest.mark.parametrize(
    "targets",
    ["first", {0}, object, [None], [[0], [1, 2]], [0.0], [True], 0, [], [-1], [5], [10**30], [[[0]]]],
    ids=str,
)
def test_targets_that_are_no_positions(targets):
    model = build("bert-classifier")
    for call, given in ((GlobEnc(model), inputs()), (GlobEnc(model).packed, {"input_ids": [[5, 6]] * 2})):
        with pytest.raises((TypeError, ValueError), match="GlobEnc: targets must"):
            call(**given, targets=targets)


@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=str)
def test_a_model_of_several_choices(shape):
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**SMALL)).eval()
    batch = {"input_ids": torch.randint(5, 97, (2, *shape))}
    for method in (GlobEnc(model), Rollout(model), TransformerAttribution(model)):
        if len(shape) == 2 and isinstance(method, TransformerAttribution):
            assert method(**batch).scores.shape == (2, 5)
            continue
        with pytest.raises(ValueError, match=r"takes input_ids \(B, choices, n\)|input_ids must be \(B, n\)"):
            method(**batch)
    with pytest.raises(ValueError, match=r"BertForMultipleChoice takes input_ids \(B, choices, n\)"):
        explain(model, tokenizer(), "film")


def test_functions_with_fixed_names():
    model, tok = build("bert-classifier"), tokenizer()
    with pytest.raises(TypeError, match=r"explain: takes no targets; did you mean target\?"):
        explain(model, tok, "film", targets=[0])
    with pytest.raises(TypeError, match=r"explain_image: takes no target; did you mean targets\?"):
        explain_image(build("vit"), None, torch.zeros(3, 12, 12), target=0)
    with pytest.raises(TypeError, match=r"capture: takes no module; did you mean modules\?"):
        capture(model, module=[])
    for method in METHODS:
        with pytest.raises(TypeError, match=rf"{method.__name__}: takes no backends; did you mean backend\?"):
            method(model, backends="cpu")


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_arguments_that_change_the_output(name):
    """Each is honoured, with the output that the model returns, or refused."""
    model, batch = build(name), inputs()
    plain = GlobEnc(model)(**batch)
    assert plain.output.get("attentions") is None and plain.output.get("hidden_states") is None
    for neutral in (
        dict(return_dict=True, output_attentions=False, use_cache=False),
        dict(labels=None, past_key_values=None),
    ):
        assert torch.equal(GlobEnc(model)(**batch, **neutral).scores, plain.scores)
    refused = dict(
        return_dict=False,
        output_attentions=True,
        use_cache=True,
        past_key_values=(),
        cache=(),
        cache_position=torch.arange(5),
    )
    for argument, value in (refused | dict(labels=torch.zeros(2, dtype=torch.long))).items():
        with pytest.raises(ValueError, match=f"GlobEnc: {argument} can't be honoured: "):
            GlobEnc(model)(**batch, **{argument: value})
    honoured = dict(output_hidden_states=True) | (
        dict(logits_to_keep=2) if name in PRE_NORM and "LM" in type(model).__name__ else {}
    )
    with torch.no_grad():
        expected = model(**batch, **honoured)
    found = GlobEnc(model)(**batch, **honoured)
    assert torch.equal(found.scores, plain.scores) and len(found.output.hidden_states) == len(
        expected.hidden_states
    )
    # eager attention of a float64 model rounds its probabilities to float32
    close = dict(rtol=1e-5, atol=1e-5) if name == "gemma2" else {}
    for own, one in zip(found.output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(own, one, **close)
    torch.testing.assert_close(found.output[0], expected[0], **close)
    # the loss of a stock model would write to its config
    assert getattr(model.config, "problem_type", None) is None


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_config_s_flags_change_no_result(name):
    batch = inputs()
    expected = GlobEnc(build(name))(**batch)
    for flag in (
        dict(output_attentions=True),
        dict(return_dict=False),
        dict(use_cache=True),
        dict(output_hidden_states=True),
    ):
        model = build(name, attention="eager")
        for key, value in flag.items():
            setattr(model.config, key, value)
        found = GlobEnc(model)(**batch)
        assert torch.equal(found.scores, expected.scores) and torch.equal(found.output[0], expected.output[0])
        assert found.output.get("attentions") is None and found.output.get("past_key_values") is None
        assert all(getattr(model.config, key) == value for key, value in flag.items())
        if name in ("bert-classifier", "distilbert"):
            TransformerAttribution(model)(**batch)
        assert "forward" not in vars(model.base_model)
        if name in ("bert-classifier", "roberta", "llama"):
            packed = GlobEnc(model).packed(input_ids=batch["input_ids"].tolist())
            torch.testing.assert_close(torch.cat([one.scores for one in packed]), expected.scores)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_token_types(name):
    model, batch = build(name), inputs()
    zeros, ones = torch.zeros_like(batch["input_ids"]), torch.ones_like(batch["input_ids"])
    globenc = GlobEnc(model)
    if name in TOKEN_TYPES:
        with torch.no_grad():
            expected = model(**batch, token_type_ids=ones)
        torch.testing.assert_close(globenc(**batch, token_type_ids=ones).output[0], expected[0])
        with pytest.raises(ValueError, match="token_type_ids must be .B, n. = .2, 5., got .2, 4."):
            globenc(**batch, token_type_ids=ones[:, 1:])
        if name != "deberta-v3":
            with pytest.raises(ValueError, match="token_type_ids must lie in"):
                globenc(**batch, token_type_ids=ones * 200)
    elif "token_type_ids" not in type(model).forward.__code__.co_varnames and not hasattr(
        model.config, "type_vocab_size"
    ):
        assert torch.equal(globenc(**batch, token_type_ids=zeros).scores, globenc(**batch).scores)
        with pytest.raises(
            TypeError, match=f"takes no token_type_ids: {type(model).__name__} has no token types"
        ):
            globenc(**batch, token_type_ids=ones)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert", "modernbert", "gpt2", "llama"])
def test_positions_of_a_batch_are_the_caller_s(name):
    model, batch = build(name), inputs()
    positions = torch.tensor([[4, 2, 9, 3, 7]])
    with torch.no_grad():
        expected = model(**batch, position_ids=positions, attention_mask=torch.ones_like(batch["input_ids"]))
    found = GlobEnc(model)(
        **batch, position_ids=positions, attention_mask=torch.ones_like(batch["input_ids"])
    )
    torch.testing.assert_close(found.output[0], expected[0])
    for wrong, message in (
        (positions + 90, "position_ids must lie in"),
        (positions[:, 1:], "position_ids must be .B, n."),
    ):
        with pytest.raises(ValueError, match=message):
            GlobEnc(model)(**batch, position_ids=wrong)
    with pytest.raises(TypeError, match="position_ids must be a tensor of int64"):
        GlobEnc(model)(**batch, position_ids=positions.double())


class Around(torch.nn.Module):
    """A user's module, which names its inputs as it likes."""

    def __init__(me):
        super().__init__()
        me.encoder, me.head = build("bert"), torch.nn.Linear(48, 3).double()

    def forward(me, input_ids, attention_mask=None, extra=None):
        return me.head(me.encoder(input_ids, attention_mask=attention_mask)[0][:, 0]) * (
            1 if extra is None else extra
        )


def test_a_user_s_module_takes_what_it_names():
    model, batch = Around().eval(), inputs()
    globenc = GlobEnc(model)
    torch.testing.assert_close(globenc(**batch, extra=2).output, 2 * globenc(**batch).output)
    for wrong in ("token_type_ids", "output_hidden_states", "me", "extras"):
        with pytest.raises(TypeError, match=f"GlobEnc: takes no {wrong}; .*"):
            globenc(**batch, **{wrong: torch.ones(2, 5, dtype=torch.long)})
    for refused in ("labels", "output_attentions"):
        with pytest.raises(ValueError, match=f"{refused} can't be honoured"):
            globenc(**batch, **{refused: True})


@pytest.mark.parametrize("name", IMAGES)
def test_image_models(name):
    model = build(name)
    batch = random_batch(model, 2, 0)
    globenc = GlobEnc(model)
    globenc(**batch, output_hidden_states=True)
    with pytest.raises(TypeError, match="GlobEnc: takes no input_ids"):
        globenc(**batch, input_ids=torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="bool_masked_pos can't be honoured"):
        globenc(**batch, bool_masked_pos=torch.ones(2, 9, dtype=torch.bool))
    if name in ("vit", "deit"):
        larger = {
            "pixel_values": torch.randn(1, 3, 16, 20, dtype=torch.float64),
            "interpolate_pos_encoding": True,
        }
        with torch.no_grad():
            expected = model(**larger)
        torch.testing.assert_close(globenc(**larger).output[0], expected[0])

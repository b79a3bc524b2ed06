"""Transformer attribution of packed sequences is what each gets alone."""

from itertools import product

import pytest
import torch
from models import build
from sweeps import sweep

from pyglobenc import TransformerAttribution
from pyglobenc.methods.relevance.variants import FOLLOWED, VARIANTS

# unsorted, two of one length, one of one token
LENGTHS = (7, 3, 12, 3, 1, 20)
TENSORS = ("scores", "target", "position", "logit", "relevance")


def sequences():
    return [torch.randint(5, 97, (n,)).tolist() for n in LENGTHS]


def check(found, ids, alone, rtol=1e-6):
    """Results of every sequence against those of a batch of one."""
    for row, one in zip(ids, found, strict=True):
        expected = alone(torch.tensor([row]))
        for name in TENSORS:
            got, wanted = getattr(one, name), getattr(expected, name)
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
        torch.testing.assert_close(one.output.logits, expected.output.logits)
        assert one.diagnostics.keys() == expected.diagnostics.keys()
        for name, value in one.diagnostics.items():
            torch.testing.assert_close(value, expected.diagnostics[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, variant",
    [
        *(("bert-classifier", name) for name, variant in VARIANTS.items() if variant.kind in FOLLOWED),
        *sweep(
            product(("roberta", "electra", "distilbert"), ("transformer_attribution", "lrp")),
            [("roberta", "lrp"), ("distilbert", "transformer_attribution")],
        ),
    ],
)
def test_equals_each_alone(name, variant):
    ta, ids = TransformerAttribution(build(name)), sequences()
    options = dict(variant=variant, reliability="off", layers=True)
    check(ta.packed(input_ids=ids, **options), ids, lambda row: ta(input_ids=row, **options))


@pytest.mark.parametrize(
    "options", [dict(target=1), dict(target=0, contrast=1), dict(start_layer=2)], ids=str
)
def test_options(options):
    ta, ids = TransformerAttribution(build("bert-classifier"), stabilizer=1e-6), sequences()
    types = [[int(i > 1) for i in range(n)] for n in LENGTHS]
    found = ta.packed(input_ids=ids, token_type_ids=types, **options)
    assert all(one.error is None and one.relevance is None for one in found), (
        "no error of float64, which would be estimated"
    )

    def alone(row):
        return ta(
            input_ids=row,
            token_type_ids=(torch.arange(row.shape[1]) > 1).long()[None],
            reliability="off",
            **options,
        )

    check(found, ids, alone)


def test_a_class_of_each():
    ta, ids = TransformerAttribution(build("bert-classifier")), sequences()
    target = torch.tensor([1, 0, 0, 1, 1, 0])
    for given in (target, target.tolist()):
        assert [int(one.target) for one in ta.packed(input_ids=ids, target=given)] == target.tolist()


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("variant", ["transformer_attribution", "full"])
def test_the_error_is_measured(variant):
    """Float32 results differ by as much as the error says, so that of a sequence alone is only near."""
    ta, ids = TransformerAttribution(build("bert-classifier").float()), sequences()
    found = ta.packed(input_ids=ids, variant=variant)
    alone = [ta(input_ids=torch.tensor([row]), variant=variant, reliability="measured") for row in ids]
    assert all(one.error_method == "measured" and one.error.shape == (1,) for one in found)
    said, expected = (torch.cat([one.error for one in results]) for results in (found, alone))
    # a row of one token has no entry but its own
    told = expected > 0
    assert told.sum() >= 5 and 0.2 <= (said[told] / expected[told]).median() <= 5


def test_inference_mode():
    ta, ids = TransformerAttribution(build("bert-classifier")), sequences()
    with torch.inference_mode():
        found = ta.packed(input_ids=[torch.tensor(row) for row in ids])
    check(found, ids, lambda row: ta(input_ids=row, reliability="off"))


def test_nothing_is_left_behind():
    model = build("bert-classifier")
    ta = TransformerAttribution(model)
    with pytest.raises(ValueError, match="target must lie in"):
        ta.packed(input_ids=[[5, 6], [7, 8, 9]], target=9)
    assert "forward" not in vars(model.bert) and model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "bert-classifier",
            dict(variant="attn_gradcam"),
            "attn_gradcam only reads attention, and cannot take packed sequences",
        ),
        (
            "bert-classifier",
            dict(reliability="estimated"),
            "for packed sequences reliability must be measured, off or auto",
        ),
        (
            "bert-classifier",
            dict(target=[0, 1, 0]),
            "target must be one integer or one for each of 2 examples",
        ),
        (
            "bert-classifier",
            dict(attention_mask=[[1, 0], [1, 1]]),
            "TransformerAttribution: attention_mask has zeros",
        ),
        ("vit", {}, "ViTForImageClassification takes pixel_values, which can't be packed"),
    ],
)
def test_refusals(name, options, message):
    ta = TransformerAttribution(build(name))
    with pytest.raises(ValueError, match=message):
        ta.packed(input_ids=[[5, 6], [7, 8]], **options)

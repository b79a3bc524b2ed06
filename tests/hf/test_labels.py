"""What a classifier's logits say, and what its config calls it."""

from types import SimpleNamespace

import pytest
import torch

from pyglobenc.hf.labels import class_name, predict, probabilities

LOGITS = torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64)


def config(kind=None, names=None):
    return SimpleNamespace(problem_type=kind, id2label=names)


@pytest.mark.parametrize(
    "names, expected",
    [
        ({0: "a", 1: "b", 2: "c"}, ["a", "b", "c"]),
        ({"0": "a", "1": "b", "2": "c"}, ["a", "b", "c"]),
        ({0: "a", 2: "c"}, ["a", "1", "c"]),
        ({0: "a"}, ["a", "1", "2"]),
        ({"first": "a", None: "b", 2: None, 1: 7}, ["0", "7", "2"]),
        (["a", "b", "c"], ["0", "1", "2"]),
        (None, ["0", "1", "2"]),
    ],
)
def test_every_class_has_a_name(names, expected):
    assert [class_name(config(names=names), index) for index in range(3)] == expected
    assert [name for name, _ in predict(config("regression", names), LOGITS).predictions] == expected


def test_problem_types():
    names = {0: "a", 1: "b", 2: "c"}
    for kind in (None, "single_label_classification"):
        chance = float(LOGITS.softmax(0)[2])
        assert predict(config(kind, names), LOGITS) == ("c", chance, [("c", chance)])
    chances = LOGITS.sigmoid().tolist()
    found = predict(config("multi_label_classification", names), LOGITS)
    assert found == ("c", chances[2], [("c", chances[2]), ("a", chances[0])])
    assert predict(config("multi_label_classification", names), -LOGITS.abs()) == (None, None, [])
    assert predict(config("regression", names), LOGITS) == (
        None,
        None,
        list(zip("abc", LOGITS.tolist(), strict=True)),
    )
    for kind in (None, "single_label_classification", "regression"):
        assert predict(config(kind), LOGITS[:1]) == (None, None, [("0", 0.5)])
    assert predict(config("multi_label_classification"), LOGITS[:1]).label == "0"
    with pytest.raises(
        ValueError, match="problem_type must be one of single_label_classification, .*, got 'ranking'"
    ):
        predict(config("ranking"), LOGITS)


def test_probabilities_of_a_batch():
    batch = torch.stack([LOGITS, -LOGITS])
    assert torch.equal(probabilities(config(), batch)[1], (-LOGITS).softmax(0))
    assert torch.equal(probabilities(config("multi_label_classification"), batch), batch.sigmoid())
    assert probabilities(config("regression"), batch) is None

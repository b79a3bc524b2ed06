"""The metrics of faithfulness on cases computed by hand."""

import numpy as np
import pytest

from pyglobenc.evaluate.examples import KEPT, Example, Settings, make_scores
from pyglobenc.evaluate.forwards import masked_copy
from pyglobenc.evaluate.metrics import METRICS
from pyglobenc.evaluate.metrics.perturbation import STEPS, count_of

# [CLS], two words of two pieces and one, [SEP]; the head reads [CLS].
INPUTS = {"input_ids": [2, 11, 12, 13, 3], "token_type_ids": [0, 0, 0, 1, 1]}
UNITS = np.array([KEPT, 0, 0, 1, KEPT])
EXAMPLE = Example(0, INPUTS, UNITS, target=1, probabilities=np.array([0.2, 0.8]))
SCORES = make_scores(EXAMPLE, [9, 1, 2, 2.5, 9], seed=0)


def test_a_word_has_the_sum_of_its_pieces():
    np.testing.assert_array_equal(SCORES.units, [3, 2.5])
    np.testing.assert_array_equal(SCORES.order, [0, 1])


@pytest.mark.parametrize(
    "fraction, m, count",
    [(0.01, 1, 1), (0.01, 100, 1), (0.011, 100, 2), (0.07, 100, 7), (0.3, 10, 3), (1, 7, 7)],
)
def test_fractions_are_rounded_up(fraction, m, count):
    assert count_of(fraction, m) == count


@pytest.mark.parametrize(
    "remove, expected",
    [
        ("mask", {"input_ids": [2, 4, 4, 13, 3], "token_type_ids": [0, 0, 0, 1, 1]}),
        ("delete", {"input_ids": [2, 13, 3], "token_type_ids": [0, 1, 1]}),
        ("pad", INPUTS | {"attention_mask": [1, 0, 0, 1, 1]}),
    ],
)
def test_special_tokens_always_stay(remove, expected):
    settings = Settings((0.5,), remove, mask_id=4)
    assert masked_copy(EXAMPLE, np.array([False, True]), settings) == expected


def value(name, targets, fractions):
    """The metric for these probabilities of the explained class, the second of two."""
    chances = np.array([[1 - p, p] for p in targets])
    return METRICS[name].value(EXAMPLE, SCORES, chances, Settings(fractions))


def test_means_over_fractions():
    assert value("comprehensiveness", [0.5, 0.1], (0.5, 1)) == pytest.approx((0.3 + 0.7) / 2)
    assert value("sufficiency", [0.9], (0.5,)) == pytest.approx(-0.1)
    assert value("log-odds", [0.4, 0.1], (0.5, 1)) == pytest.approx((np.log(0.5) + np.log(0.125)) / 2)
    assert value("decision-flips", [0.4, 0.6, 0.1], (0.1, 0.5, 1)) == pytest.approx(2 / 3)
    assert np.isfinite(value("log-odds", [0.0], (0.5,)))
    assert all(np.isnan(value(name, [np.nan], (1,))) for name in ("comprehensiveness", "decision-flips"))


def test_the_area_under_a_curve():
    found = value("positive-perturbation", np.linspace(0.7, 0, 9), STEPS)
    # From 0.8, 0.7 and then a straight line to 0: trapezoids of width 0.1, divided by 0.9.
    assert found[""] == pytest.approx((0.1 * 0.75 + 0.8 * 0.35) / 0.9)
    assert list(found) == ["", "0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9"]
    assert (found["0"], found["0.9"]) == (0.8, 0.0)


def test_curves_start_from_either_end():
    settings = Settings((0.5,))
    highest = METRICS["positive-perturbation"].queries(EXAMPLE, SCORES, settings)
    lowest = METRICS["negative-perturbation"].queries(EXAMPLE, SCORES, settings)
    # Up to half of two units is one unit.
    assert [stays.tolist() for stays in highest] == [[False, True]] * 5 + [[False, False]] * 4
    assert [stays.tolist() for stays in lowest] == [[True, False]] * 5 + [[False, False]] * 4

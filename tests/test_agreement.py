"""benchmarks/agreement.py: which times of two CSV files are compared, and when they agree."""

import agreement
import pytest
from test_plot import MACHINE, row, write

COMMAND = MACHINE | {"median_s": "1.0", "q1_s": "0.98", "q3_s": "1.02"}


def suite_row(median, **more):
    return row(512, "cpu", median, dtype="float32", batch="1") | {"q1_s": str(0.99 * median), "q3_s": str(1.01 * median)} | more


@pytest.mark.parametrize("median, agree", [(1.0, True), (1.09, True), (0.93, True), (1.2, False), (0.8, False)])
def test_ratio(median, agree):
    assert agreement.compare([COMMAND, suite_row(median)]) == [("head_gram cpu 512 float32", median, agree)]


def test_quartiles_that_meet_agree_however_far_the_medians():
    assert agreement.compare([suite_row(2.0, q1_s="1.01"), COMMAND])[0][2]


def test_of_several_runs_the_whole_range_counts():
    """Two runs of the command: the ratio to their median, agreement with what lies between their quartiles."""
    rows = [COMMAND, COMMAND | {"median_s": "3.0", "q1_s": "2.9", "q3_s": "3.1"}]
    assert agreement.compare([*rows, suite_row(2.5)]) == [("head_gram cpu 512 float32", 1.25, True)]
    assert not agreement.compare([*rows, suite_row(3.5)])[0][2]


@pytest.mark.parametrize("name, other", [("batch", "8"), ("n", "128"), ("dtype", "bfloat16"), ("threads", "1"), ("device", "x")])
def test_only_the_same_call_is_compared(name, other):
    assert agreement.compare([COMMAND, suite_row(1.0, **{name: other})]) == []


def test_command(tmp_path, capsys):
    machine = write(tmp_path / "machine.csv", [COMMAND])
    equal = write(tmp_path / "head_gram.csv", [suite_row(1.0)])
    assert agreement.main([str(machine), str(equal)]) == 0
    assert "1 of 1 agree" in capsys.readouterr().out
    slow = write(tmp_path / "slow.csv", [suite_row(3.0)])
    assert agreement.main([str(machine), str(slow)]) == 1
    assert "3.00  DIFFERS  head_gram cpu 512" in capsys.readouterr().out

"""benchmarks/agreement.py: which times of the command's and the suites' CSV files are compared, and when they agree."""

import agreement
import pytest
from plot import read
from test_plot import MACHINE, row, write

COMMAND = MACHINE | {"median_s": "1.0", "q1_s": "0.98", "q3_s": "1.02"}


def suite_row(median, **more):
    return row(512, "cpu", median, dtype="float32", batch="1") | {"q1_s": str(0.99 * median), "q3_s": str(1.01 * median)} | more


@pytest.mark.parametrize("median, agree", [(1.0, True), (1.09, True), (0.93, True), (1.2, False), (0.8, False)])
def test_ratio(median, agree):
    (found,) = agreement.compare([COMMAND, suite_row(median)])
    assert (found["op"], found["backend"], found["ratio"], found["agree"]) == ("head_gram", "cpu", median, agree)


def test_quartiles_that_meet_agree_however_far_the_medians():
    assert agreement.compare([suite_row(2.0, q1_s="1.01"), COMMAND])[0]["agree"]


def test_all_runs_of_both_count():
    """Two runs of each: medians over the runs, agreement by what lies between the outermost quartiles."""
    command = [COMMAND, COMMAND | {"median_s": "3.0", "q1_s": "2.9", "q3_s": "3.1"}]
    (found,) = agreement.compare([*command, suite_row(2.0), suite_row(3.0)])
    assert (found["ratio"], found["command_spread"], found["suite_spread"], found["runs"]) == (1.25, 3.0, 1.5, 2)
    assert found["agree"]
    assert not agreement.compare([*command, suite_row(3.5), suite_row(4.5)])[0]["agree"]


@pytest.mark.parametrize("name, other", [("batch", "8"), ("n", "128"), ("dtype", "bfloat16"), ("threads", "1"), ("device", "x")])
def test_only_the_same_call_is_compared(name, other):
    assert agreement.compare([COMMAND, suite_row(1.0, **{name: other})]) == []


def test_command(tmp_path, capsys):
    machine = write(tmp_path / "machine.csv", [COMMAND])
    equal = write(tmp_path / "head_gram.csv", [suite_row(1.0)])
    assert agreement.main([str(machine), str(equal), "--csv", str(tmp_path / "out.csv")]) == 0
    assert "1 of 1 agree" in capsys.readouterr().out
    assert read(tmp_path / "out.csv")[0]["ratio"] == "1"
    slow = write(tmp_path / "slow.csv", [suite_row(3.0)])
    assert agreement.main([str(machine), str(slow)]) == 1
    assert "3.00  DIFFERS  head_gram cpu 512" in capsys.readouterr().out

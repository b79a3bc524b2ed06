"""benchmarks/guard.py: which ratios count as slower, and whose numbers a file holds, without any timing."""

import guard
import pytest
import torch


def rows(device="a processor, 2 cores", **ratios):
    where = {"rounds": "9", "threads": "1", "device": device, "torch": "2.13"}
    return [
        {"case": case, "n": "128", "ratio": f"{ratio:.3f}"}
        | {"ratio_q1": f"{0.95 * ratio:.3f}", "ratio_q3": f"{1.05 * ratio:.3f}"}
        | where
        for case, ratio in ratios.items()
    ]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def main(measured, *argv):
        monkeypatch.setattr(guard, "measure", lambda: measured)
        return guard.main(
            [*argv, "--file", str(tmp_path / "guard.csv"), "--threads", str(torch.get_num_threads())]
        )

    return main


def test_only_a_case_that_got_slower_than_noise_fails(run, capsys):
    assert run(rows(globenc=1.2, head_gram=0.1), "--save") == 0
    assert run(rows(globenc=1.2, head_gram=0.1)) == 0
    assert run(rows(globenc=1.3, head_gram=0.05)) == 0, "within noise, and faster"
    capsys.readouterr()
    assert run(rows(globenc=1.2, head_gram=0.2)) == 1
    marked = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "SLOWER" in line]
    assert marked == ["head_gram"]


def test_machines_are_compared_with_their_own_kind(run, capsys):
    run(rows(globenc=1.2), "--save")
    assert run(rows("another", globenc=9.0)) == 0
    assert "no numbers for another" in capsys.readouterr().err
    run(rows("another", globenc=9.0), "--save")
    assert run(rows("another", globenc=9.0)) == 0
    assert run(rows(globenc=9.0)) == 1, "the first machine's numbers are still there"


def test_every_case_runs():
    measured = guard.measure(lengths=(8,), layers=1, rounds=2)
    methods = ["globenc", "transformer_attribution", "gradient_rollout"]
    assert [row["case"] for row in measured] == [*methods, *guard.OPS]
    assert all(float(row["ratio"]) > 0 for row in measured)

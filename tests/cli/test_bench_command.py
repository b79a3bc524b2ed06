"""`pyglobenc bench`: what it counts, which files it writes, and how backend="auto" uses its table."""

import csv
import json
from importlib import import_module
from math import prod

import pytest
import torch

from pyglobenc.backends import dispatch as backends
from pyglobenc.backends import measurements as device_table
from pyglobenc.backends.inputs import PairInputs
from pyglobenc.bench import ceilings
from pyglobenc.bench.costs import Ceilings, Cost, count, flatten
from pyglobenc.bench.example_inputs import DH, H, tensors
from pyglobenc.bench.op_table import OP_TABLE
from pyglobenc.cli import bench
from pyglobenc.cli.main import main

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return the path of this test's own table, which is read anew."""
    path = tmp_path / "cache" / "backends.json"
    monkeypatch.setenv("PYGLOBENC_TABLE", str(path))
    monkeypatch.setattr(device_table, "SHIPPED", (tmp_path / "shipped.json",))
    device_table._table.cache_clear()
    yield path
    device_table._table.cache_clear()


def test_command(table, tmp_path, capsys):
    files = ["--csv", str(tmp_path / "a.csv"), "--png", str(tmp_path / "a.png")]
    ops = ["--op", "rollout_step", "--op", "head_gram", "--op", "add_relevance"]
    measured = ["bench", "--n", "32", "--seconds", "0.005", "--quiet"]
    assert main([*measured, "--op", "head_gram"]) == 0 and not table.exists()
    capsys.readouterr()
    assert main([*measured, *ops, *files, "--save"]) == 0
    printed = capsys.readouterr().out
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"rollout_step", "head_gram", "add_relevance"}
    for row in rows:
        reached = Ceilings(*(float(row[name]) for name in ("gemm_flops", "exp_rate", "copy_bytes")))
        cost = Cost(*(float(row[name]) for name in ("flops", "exps", "bytes")))
        assert float(row["floor_s"]) == pytest.approx(cost.floor(reached, overlap=False), rel=1e-4)
        assert float(row["share"]) == pytest.approx(float(row["floor_s"]) / float(row["median_s"]), rel=1e-4)
        assert float(row["q1_s"]) <= float(row["median_s"]) <= float(row["q3_s"]) and int(row["rounds"]) >= 3
        assert row["op"] in printed and row["device"] in printed
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(table.read_bytes())[device_table.device_name("cpu")].keys() == {
        row["op"] for row in rows
    }


def test_unknown_op_and_unwritable_file(table, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--op", "nothing"])
    assert "--op: must be one of" in capsys.readouterr().err
    assert main(["bench", "--csv", str(tmp_path / "none" / "a.csv")]) == 1
    assert "there is no folder" in capsys.readouterr().err


PAIRS = (
    *("pair_norms", "rollout_step", "relevance_attention", "relevance_maps", "relevance_product"),
    "relevance_rollout_step",
)


@pytest.mark.parametrize("op", list(OP_TABLE))
def test_counts_grow_as_the_formulas_say(op):
    """For twice the tokens, work on pairs grows four times, on tokens twice, and on weights not at all."""
    small, middle, large = (count(op, [], [], batch=1, heads=H, n=n, dh=DH) for n in (128, 256, 512))
    factor = 4 if op in PAIRS else 2
    assert (
        large.flops - middle.flops == factor * (middle.flops - small.flops)
        and large.exps == factor * middle.exps
    )


def test_head_norms_count_the_shorter_way():
    """For long inputs the quadratic forms, whose matrices are made once, cost less than the vectors."""
    short, long = (count("head_norms", [], [], batch=1, heads=H, n=n, dh=DH).flops for n in (48, 512))
    assert short == 2 * 48 * (H * DH) ** 2 and long == 2 * (512 * H * DH**2 + H * DH**2 * H * DH)


@pytest.mark.parametrize("op", ["head_norms", "head_gram", "linear_relevance"])
def test_counts_of_products_are_those_that_torch_counts(op):
    """The counts are at most those of the reference, which takes no shorter way."""
    from torch.utils.flop_counter import FlopCounterMode

    args = OP_TABLE[op].arguments(tensors("cpu", 48))
    function = import_module(f"pyglobenc.backends.reference.{op}").run
    with FlopCounterMode(display=False) as counter:
        function(*args)
    ours = count(op, [], [], batch=1, heads=H, n=48, dh=DH).flops
    assert 0.9 * ours <= counter.get_total_flops() <= 1.15 * ours


def test_bytes_are_those_of_arguments_and_results():
    args = [torch.zeros(2, 3), [torch.zeros(5), None]]
    assert (
        count(
            "clone_relevance", args, (torch.zeros(7, dtype=torch.float64),), batch=1, heads=1, n=1, dh=1
        ).bytes
        == 4 * 11 + 8 * 7
    )
    assert [t.numel() for t in flatten(args)] == [6, 5]


def test_floor():
    known = Ceilings(flops=100.0, exps=10.0, bytes=1000.0)
    assert Cost(50, 5, 100).floor(known, overlap=False) == 1.0
    assert Cost(50, 5, 100).floor(known, overlap=True) == 0.5
    assert Cost(50, 5, 4000).floor(known, overlap=False) == 4.0


def test_ceilings_are_the_best_of_all_samples(monkeypatch):
    """The best of all samples counts, with all threads and with one, as a busy machine only slows calls."""
    taken = []

    def times(call, device, seconds):
        call()
        taken.append(torch.get_num_threads())
        return [4.0, 2.0, 8.0] if taken[-1] > 1 else [3.0, 1.0]

    monkeypatch.setattr(ceilings, "times", times)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = ceilings.measure_ceilings(CPU, torch.float32, 1.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    # The measurements are products, exponentials by each function, and copies.
    each = 2 + len(ceilings._exponentials(CPU))
    assert taken == [2] * each + [1] * each
    assert found == Ceilings(2 * prod(ceilings.GEMM), ceilings.EXPS, 2 * 4 * ceilings.COPY)


def test_every_exponential_is_one():
    x = torch.linspace(-5, 5, 1000)
    for own in ceilings._exponentials(CPU):
        out = torch.zeros_like(x)
        own(x, out)
        torch.testing.assert_close(out, x.exp())


@pytest.mark.parametrize(
    "once, seconds, repeats, rounds",
    [
        (2**-17, 0.0, 13, 3),
        (2**-17, 2**-8, 13, 39),
        (2**-10, 2**-4, 1, 64),
        (2**-7, 9.0, 1, 200),
        (2.0, 0.5, 1, 3),
    ],
)
def test_samples(monkeypatch, once, seconds, repeats, rounds):
    """Short calls share a sample, and the number of samples follows the time; long calls warm up once."""
    clock, calls = [0.0], [0]

    def call():
        calls[0] += 1
        clock[0] += once

    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: clock[0])
    sample, *found = ceilings.prepare(call, CPU, seconds)
    assert found == [repeats, rounds]
    warm, calls[0] = calls[0], 0
    sample()
    assert calls[0] == repeats and (warm == 1 if once > 1 else warm * once >= ceilings.WARM_UP)
    calls[0] = 0
    assert ceilings.times(call, CPU, seconds) == [once] * rounds
    assert calls[0] == warm + repeats * rounds


def test_measured_calls_come_after_a_large_block_was_released(monkeypatch):
    """glibc keeps freed memory up to the size of the largest block that was released, up to 32 MB."""
    events = []
    monkeypatch.setattr(ceilings.torch, "empty", lambda *size, **options: events.append(size))
    ceilings.prepare(lambda: events.append("call"), CPU, 0.0)
    assert events[0] == (ceilings.KEPT,) and set(events[1:]) == {"call"}
    assert 31 << 20 < ceilings.KEPT < 32 << 20


def test_auto_goes_by_the_table(table):
    """Without a table, an op's own order counts; with one, the measured order, on that device only."""

    def chosen():
        device_table._table.cache_clear()
        return backends.pick("rollout_step", "auto", ("cpu", "reference"), rollout_arguments()).__module__

    default = chosen()
    table.parent.mkdir()
    table.write_text(json.dumps({"another device": {"rollout_step": ["reference"]}}))
    assert chosen() == default
    table.write_text(
        json.dumps({device_table.device_name("cpu"): {"rollout_step": ["nonsense", "reference"]}})
    )
    assert chosen() == "pyglobenc.backends.reference.rollout_step"
    table.write_text("not JSON")
    assert chosen() == default


def test_what_comes_with_the_package_is_asked_last(table, monkeypatch):
    here = device_table.device_name("cpu")
    device_table.SHIPPED[0].write_text(
        json.dumps({here: {"rollout_step": ["reference"], "head_gram": ["reference"]}})
    )
    rooms = ("cpu", "reference")
    assert device_table.preferred("rollout_step", rooms, "cpu") == ("reference", "cpu")
    device_table.save_table("cpu", {"rollout_step": ["cpu"]})
    assert json.loads(table.read_bytes()) == {here: {"rollout_step": ["cpu"]}}, "its own measurements alone"
    assert device_table.preferred("rollout_step", rooms, "cpu") == ("cpu", "reference")
    assert device_table.preferred("head_gram", rooms, "cpu") == ("reference", "cpu")
    monkeypatch.setenv("PYGLOBENC_TABLE", "")
    device_table._table.cache_clear()
    assert device_table.preferred("head_gram", rooms, "cpu") == ("cpu", "reference")


def rollout_arguments():
    r, log_scale, q, k, lse, gram = OP_TABLE["rollout_step"].arguments(tensors("cpu", 8))
    return PairInputs(q, k, lse, gram, None, None, None, None, 1.0, (-1, -1)), r, log_scale


def test_saving_keeps_other_devices(table):
    table.parent.mkdir()
    table.write_text(json.dumps({"another device": {"head_gram": ["triton"]}}))
    device_table._table.cache_clear()
    assert device_table.save_table("cpu", {"head_gram": ["reference"]}) == table
    found = json.loads(table.read_bytes())
    assert found == {
        "another device": {"head_gram": ["triton"]},
        device_table.device_name("cpu"): {"head_gram": ["reference"]},
    }


def test_order_changes_only_for_a_clear_gain(monkeypatch):
    monkeypatch.setattr(bench, "backends_of", lambda op: ("cpu", "reference"))

    def order(**medians):
        rows = [
            {"op": "a", "backend": name, "median_s": t, "q1_s": 0.9 * t, "q3_s": 1.2 * t}
            for name, t in medians.items()
        ]
        return bench.fastest_first(rows)["a"]

    assert order(cpu=1.0, reference=2.0) == order(cpu=1.0, reference=0.8) == ["cpu", "reference"]
    assert order(cpu=1.0, reference=0.7) == ["reference", "cpu"]
    assert order(reference=0.5) == ["reference"]

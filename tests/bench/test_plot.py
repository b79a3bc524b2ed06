"""benchmarks/plot.py: lines, floors and files, from CSV files of the benchmarks and of `pyglobenc bench`."""

import csv

import plot
import pytest

HERE = {"threads": "2", "device": "a processor, 2 cores", "torch": "2.13"}
MACHINE = HERE | {"op": "head_gram", "backend": "cpu", "n": "512", "dtype": "float32", "median_s": "1"}
MACHINE |= {
    "flops": "50",
    "bytes": "100",
    "exps": "0",
    "gemm_flops": "100",
    "exp_rate": "10",
    "copy_bytes": "1000",
}


def row(n, backend, median, **more):
    common = {
        "benchmark": "head_gram",
        "n": str(n),
        "backend": backend,
        "median_s": str(median),
        "rounds": "15",
    }
    return common | {"q1_s": str(0.9 * median), "q3_s": str(1.2 * median)} | HERE | more


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for one in rows for key in one)))
        writer.writeheader()
        writer.writerows(rows)
    return path


ROWS = [
    row(512, "cpu", 2.0, flops="50", exps="5", bytes="100", peak_mb="3"),
    row(128, "cpu", 1.0, flops="25", exps="5", bytes="4000", peak_mb="1"),
    row(128, "reference", 2.0, flops="25", exps="5", bytes="4000", peak_mb="2"),
]


def drawn(figure):
    """Return the points of every named line in the single panel."""
    (axes,) = figure.axes
    return points_of(axes)


def points_of(axes):
    assert axes.get_xscale() == axes.get_yscale() == "log"
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_time_with_its_floor():
    found = drawn(plot.picture(ROWS, "median_s", "s", [MACHINE], "title"))
    assert found.pop("cpu") == [(128, 1.0), (512, 2.0)], "in the order of n"
    assert found.pop("reference") == [(128, 2.0)]
    # 4000 bytes take 4 s at 1000 a second. 50 operations at 100 a second and 5 exponentials at 10 take 1 s.
    assert found == {"floor by operations and bytes": [(128, 4.0), (512, 1.0)]}


@pytest.mark.parametrize("change", [{"device": "another"}, {"threads": "1"}])
def test_no_floor_from_other_machines(change):
    assert "floor by operations and bytes" not in drawn(
        plot.picture(ROWS, "median_s", "s", [MACHINE | change], "title")
    )


def test_panels_and_floors_of_an_op_suite():
    """Each dtype and batch has a panel; ceilings come from the row, and the floor is the op's own."""
    reached = {"gemm_flops": "10", "exp_rate": "10", "copy_bytes": "1000", "exps": "0", "bytes": "1"}
    rows = [
        row(128, "cpu", 9.0, dtype="float32", batch="1", flops="20", **reached),
        row(128, "sdpa", 3.0, dtype="float32", batch="1", flops="10", **reached),
        row(128, "cpu", 5.0, dtype="bfloat16", batch="8", flops="40", **reached),
    ]
    first, second = plot.picture(rows, "median_s", "s", [], "title").axes
    assert (first.get_title(), second.get_title()) == ("dtype float32, batch 1", "dtype bfloat16, batch 8")
    floor = "floor by operations and bytes"
    assert points_of(first) == {"cpu": [(128, 9.0)], "sdpa": [(128, 3.0)], floor: [(128, 2.0)]}
    assert points_of(second)[floor] == [(128, 4.0)]


def test_every_length_has_a_tick():
    """Every panel has a tick at each length and nowhere else, even if the last panel lacks that length."""
    rows = [
        row(n, "cpu", 1.0, dtype="float32", batch=batch) for n, batch in ((128, "1"), (512, "1"), (128, "8"))
    ]
    for axes in plot.picture(rows, "median_s", "s", [], "title").axes:
        assert list(axes.get_xticks()) == [128, 512] and list(axes.get_xticks(minor=True)) == []


def test_memory():
    assert drawn(plot.picture(ROWS, "peak_mb", "MiB", [], "title"))["cpu"] == [(128, 1.0), (512, 3.0)]
    assert plot.picture([row(128, "cpu", 1.0)], "peak_mb", "MiB", [], "title") is None


def test_files(tmp_path, capsys):
    path = write(tmp_path / "head_gram.csv", ROWS)
    machine = write(
        tmp_path / "machine.csv", [MACHINE, MACHINE | {"op": "pair_norms", "backend": "reference"}]
    )
    suite = write(
        tmp_path / "suite.csv",
        [MACHINE | row(n, "cpu", n / 64, dtype="float32", batch="1") for n in (128, 512)],
    )
    assert plot.main([*map(str, (path, machine, suite)), "--output", str(tmp_path / "out")]) == 0
    made = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert made.keys() == {
        "head_gram-time.png",
        "head_gram-memory.png",
        "machine-roofline.png",
        "suite-time.png",
        "suite-roofline.png",
    }
    printed = capsys.readouterr().out
    assert all(data.startswith(b"\x89PNG") and name in printed for name, data in made.items())


def test_roofline_marks_every_op_under_the_roof():
    (axes,) = plot.roofline([MACHINE], "here").axes
    assert [text.get_text() for text in axes.texts].count("head_gram") == 1
    roof, point = axes.get_lines()[0], axes.get_lines()[1]
    assert point.get_data()[0][0] == 0.5 and point.get_data()[1][0] == 50
    assert max(roof.get_ydata()) == 100


def test_roofline_of_an_op_suite_has_a_roof_for_each_dtype():
    half = {"op": "", "dtype": "bfloat16", "gemm_flops": "200", "flops": "80"}
    (axes,) = plot.roofline(
        [MACHINE, MACHINE | half, MACHINE | {"op": "add_relevance", "flops": "0"}], "here"
    ).axes
    texts = [text.get_text() for text in axes.texts]
    assert "n=512" in texts and "add_relevance" not in texts
    assert [max(line.get_ydata()) for line in axes.get_lines()[:4]] == [100, 200, 50, 80]

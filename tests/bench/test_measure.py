"""benchmarks/measure.py: quartiles of pairs, and tables of several devices."""

import csv

from measure import merge, paired_times, ratio_of, spread


def rows(path):
    with open(path, newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_a_table_keeps_what_was_not_measured_anew(tmp_path):
    path = tmp_path / "a.csv"

    def row(n, seconds, device, **more):
        return dict(benchmark="op", n=n, median_s=seconds, threads=1, device=device) | more

    merge(path, [row(8, 1, "A"), row(16, 2, "A")], {"n"})
    merge(path, [row(8, 3, "B")], {"n"})
    merge(path, [row(16, 4, "A", peak_mb=5), row(0, 6, "A")], ["n"])
    assert rows(path) == [
        ("op", "8", "1", "1", "A", ""),
        ("op", "8", "3", "1", "B", ""),
        ("op", "16", "4", "1", "A", "5"),
        ("op", "0", "6", "1", "A", ""),
    ]
    merge(path, [row(0, 7, "A")], ["n"])
    assert rows(path)[-1] == ("op", "0", "7", "1", "A", "") and len(rows(path)) == 4


def test_ratios_are_of_the_same_round():
    ticks = iter([0, 1, 3, 10, 12, 13, 20, 21, 22])
    taken = paired_times(lambda: None, lambda: None, 3, lambda: next(ticks))
    assert taken == [(1, 2), (2, 1), (1, 1)]
    assert ratio_of(taken) == {"ratio": "1.000", "ratio_q1": "0.500", "ratio_q3": "2.000"}
    assert spread([3.0]) == (3.0, 3.0, 3.0)

"""Whether `pyglobenc bench` and pytest-benchmark tell the same times.

    python benchmarks/agreement.py FILE.csv ...        # runs of the command and of op suites, as many of each, in turn
    python benchmarks/agreement.py FILE.csv ... --csv benchmarks/results/agreement.csv

Compares every call that both measured (op, backend, n, dtype, one example, device, threads): the ratio of the suites' median to the
command's, beside the ratio of the slowest to the fastest run of each program. Two programs agree if their medians are no further apart
than LIMIT, or if the quartiles of one's runs reach those of the other's. Exit status 0 if all calls do.
"""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from plot import read

LIMIT = 0.1
SAME = ("backend", "n", "dtype", "device", "threads")
TIMES = ("q1_s", "median_s", "q3_s")
COMMAND, SUITE = "op", "benchmark"


def compare(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A row of figures for every call that both the command ("op") and an op suite ("benchmark") measured."""
    runs: dict[tuple, dict[str, list]] = defaultdict(lambda: {COMMAND: [], SUITE: []})
    for row in rows:
        for who in (COMMAND, SUITE):
            if row.keys() >= {who, *SAME, *TIMES} and row.get("batch", "1") == "1":
                key = (row[who], *(row[name] for name in SAME))
                runs[key][who].append([float(row[name]) for name in TIMES])
    return [_agreement(key, *found.values()) for key, found in runs.items() if all(found.values())]


def _agreement(key: tuple, command: list, suite: list) -> dict[str, Any]:
    """Figures of one call from (first quartile, median, third quartile) of each run."""
    (lows, middles, highs), (other_lows, others, other_highs) = (tuple(zip(*runs, strict=True)) for runs in (command, suite))
    ratio = median(others) / median(middles)
    meet = min(other_lows) <= max(highs) and min(lows) <= max(other_highs)
    figures = {"command_s": median(middles), "suite_s": median(others), "ratio": ratio}
    spread = {"command_spread": max(middles) / min(middles), "suite_spread": max(others) / min(others)}
    verdict = {"runs": min(len(middles), len(others)), "agree": meet or 1 / (1 + LIMIT) <= ratio <= 1 + LIMIT}
    return dict(zip(("op", *SAME), key, strict=True)) | figures | spread | verdict


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="what the command and op suites wrote")
    parser.add_argument("--csv", type=Path, help="where the figures go")
    options = parser.parse_args(arguments)
    found = compare([row for path in options.files for row in read(path)])
    if not found:
        parser.error("no call is in both: the op suites and the command must have run on one device with as many threads")
    for row in found:
        call = " ".join(row[name] for name in ("op", "backend", "n", "dtype"))
        spread = f"(runs of the command differ by {row['command_spread']:.2f}, of the suite by {row['suite_spread']:.2f})"
        print(f"{row['ratio']:6.2f}  {'' if row['agree'] else 'DIFFERS  '}{call} {spread}")
    print(f"median ratio {median(row['ratio'] for row in found):.2f}; {sum(row['agree'] for row in found)} of {len(found)} agree")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in found)
    return int(not all(row["agree"] for row in found))


if __name__ == "__main__":
    sys.exit(main())

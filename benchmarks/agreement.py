"""Whether `pyglobenc bench` and pytest-benchmark tell the same times.

    pyglobenc bench --threads 2 --no-table --csv benchmarks/results/machine.csv
    python benchmarks/agreement.py                     # every file of benchmarks/results
    python benchmarks/agreement.py FILE.csv ...        # of the command and of op suites

Compares every call that both measured (op, backend, n, dtype, one example, device, threads) and prints the ratio of pytest-benchmark's
median to the command's. Two times agree if the quartiles of one reach those of the other, or if they are no further apart than LIMIT,
about what two runs of one program differ by; of several runs of the command the lowest and the highest quartile count, since arrays that
share a cache are up to 30 % slower in one process than in the next. Exit status 0 if all agree.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from plot import RESULTS, read

LIMIT = 0.1
SAME = ("backend", "n", "dtype", "device", "threads")
TIMES = ("q1_s", "median_s", "q3_s")


def compare(rows: list[dict[str, str]]) -> list[tuple[str, float, bool]]:
    """Call, ratio and whether both agree, of every call that the command ("op") and a suite ("benchmark") measured."""
    measured: dict[tuple, list] = {}
    for row in rows:
        if "op" in row:
            measured.setdefault((row["op"], *(row[name] for name in SAME)), []).append([float(row[name]) for name in TIMES])
    out = []
    for row in rows:
        key = (row.get("benchmark"), *(row.get(name) for name in SAME))
        if key not in measured or row.get("batch", "1") != "1":
            continue
        low, middle, high = (float(row[name]) for name in TIMES)
        lows, middles, highs = zip(*measured[key], strict=True)
        ratio = middle / median(middles)
        agree = (low <= max(highs) and min(lows) <= high) or 1 / (1 + LIMIT) <= ratio <= 1 + LIMIT
        out.append((" ".join(key[:4]), ratio, agree))
    return out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="what the command and op suites wrote (default: all of benchmarks/results)")
    files = parser.parse_args(arguments).files or sorted(RESULTS.glob("*.csv"))
    found = compare([row for path in files for row in read(path)])
    if not found:
        parser.error("no call is in both: the op suites and the command must have run on one device with as many threads")
    for call, ratio, agree in found:
        print(f"{ratio:6.2f}  {'' if agree else 'DIFFERS  '}{call}")
    print(f"median ratio {median(ratio for _, ratio, _ in found):.2f}; {sum(agree for *_, agree in found)} of {len(found)} agree")
    return int(not all(agree for *_, agree in found))


if __name__ == "__main__":
    sys.exit(main())

"""Keeps the tables of `pyglobenc evaluate` as a CSV that names the device.

    python benchmarks/keep_table.py --csv NAME OUTPUT_FOLDER ...

The rows of all folders are written to benchmarks/results/NAME.csv, without the points of curves.
"""

import argparse
import csv
from pathlib import Path

import torch
from conftest import RESULTS

from pyglobenc.backends.measurements import device_name

COLUMNS = ("method", "metric", "mean", "low", "high", "n", "skipped", "zeros", "seconds_per_text")
NUMBERS = ("mean", "low", "high", "seconds_per_text")


def main(folders: list[Path], name: str) -> None:
    """Write the rows of the folders' tables to `name`.csv."""
    common = {"device": device_name("cpu"), "torch": torch.__version__}
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *common], lineterminator="\n")
        writer.writeheader()
        for folder in folders:
            with open(folder / "table.csv", newline="") as table:
                for row in csv.DictReader(table):
                    if row["metric"].rpartition(".")[2].isdecimal():
                        continue
                    kept = {column: row[column] for column in COLUMNS}
                    kept |= {column: f"{float(row[column]):.4f}" for column in NUMBERS}
                    writer.writerow(kept | common)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Keep tables of pyglobenc evaluate as one CSV.")
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of pyglobenc evaluate")
    parser.add_argument("--csv", required=True, dest="name", help="write benchmarks/results/NAME.csv")
    main(**vars(parser.parse_args()))

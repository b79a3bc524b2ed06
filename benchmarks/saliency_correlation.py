"""Spearman's correlation of rollouts with saliency, as in GlobEnc's table: a row for each method and layer.

    python benchmarks/saliency_correlation.py --model DIR --input dev.tsv --csv saliency_correlation

Each line of the input is a sentence, a tab, and 0 or 1. The table of the last layers is printed, and all rows
are written to benchmarks/results/NAME.csv.
"""

import argparse
import csv

import torch
from conftest import RESULTS

from pyglobenc.backends.measurements import device_name
from pyglobenc.evaluate.correlation import TABLE, layer_correlations
from pyglobenc.models.pretrained import load_pretrained
from pyglobenc.models.train_sst2_head import read

# Each run: the arguments that differ from the published protocol.
RUNS = (
    {},
    {"content": True},
    {"mode": "sum"},
    {"saliency": "saliency"},
)
DEFAULTS = {"mode": "row", "saliency": "gradient-x-input-norm", "content": False}


def main(model: str, data: str, name: str | None, limit: int | None) -> None:
    """Print the table of a model on the file `data`, and write all rows to `name`.csv if it is given."""
    loaded, (texts, _) = load_pretrained(model), read(data)
    common = {"device": device_name(loaded[0].device.type), "torch": torch.__version__}
    rows = []
    for changes in RUNS:
        chosen = DEFAULTS | changes
        found = layer_correlations(*loaded, texts[:limit], **chosen)
        print(", ".join(f"{key} {value}" for key, value in chosen.items()))
        for label, method in TABLE.items():
            of_method = found[method].rows()
            rows += [{"name": label, "method": method} | chosen | row | common for row in of_method]
            top = of_method[0]
            print(f"  {label:11} {top['mean']:6.3f} +- {top['sd']:.3f}  ({top['n']} texts)", flush=True)
    if name is not None:
        with open(RESULTS / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"mean": f"{row['mean']:.4f}", "sd": f"{row['sd']:.4f}"} for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Correlate rollouts with saliency.")
    parser.add_argument("--model", required=True, help="folder of a fine-tuned classifier")
    parser.add_argument("--input", required=True, dest="data", help="file of sentences and labels")
    parser.add_argument("--csv", dest="name", help="write benchmarks/results/NAME.csv")
    parser.add_argument("--limit", type=int, help="use the first LIMIT sentences alone")
    main(**vars(parser.parse_args()))

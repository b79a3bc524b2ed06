"""Tells what got slower: times a short set of calls and compares them with the committed numbers.

    python benchmarks/guard.py           # exits with 1 if a call got slower than noise explains
    python benchmarks/guard.py --save    # writes this machine's numbers to benchmarks/results/guard.csv

Each call is timed in turn with the plain forward pass of the same model, which has a few layers of
BERT-base's shape. The ratios of neighbours in time are compared, because a shared machine's speed drifts. On
a CPU with one thread the clock is the thread's own processor time, which other processes hardly change.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch
from measure import DEVICE, finished, paired_ratio
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import GlobEnc, GradientRollout, TransformerAttribution
from pyglobenc.backends.measurements import device_name
from pyglobenc.bench.example_inputs import tensors
from pyglobenc.bench.op_table import OP_TABLE

RESULTS = Path(__file__).parent / "results" / "guard.csv"
LENGTHS, LAYERS, ROUNDS = (128, 512), 2, 15
OPS = ("norm_terms", "head_gram", "rollout_step", "linear_relevance", "relevance_attention")
# A call got slower if its lower quartile exceeds the committed upper one by this factor. Processes that run
# the same code differ by their memory's layout, which quartiles within one process don't show.
NOISE = 1.1


def cases(n: int, layers: int) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Yield the name of each case, its call, and the forward pass on n tokens that it is compared with."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, attn_implementation="sdpa"))
    model = model.to(DEVICE).eval()
    batch = {"input_ids": torch.randint(1000, 30000, (1, n)).to(DEVICE)}

    @torch.no_grad()
    def forward() -> object:
        return model(**batch)

    globenc, relevance, gradients = GlobEnc(model), TransformerAttribution(model), GradientRollout(model)
    yield "globenc", lambda: globenc(**batch), forward
    yield "transformer_attribution", lambda: relevance(**batch, reliability="off"), forward
    yield "gradient_rollout", lambda: gradients(**batch), forward
    for op in OPS:
        function, args = (
            getattr(import_module(f"pyglobenc.ops.{op}"), op),
            OP_TABLE[op].arguments(tensors(DEVICE.type, n)),
        )
        yield op, lambda function=function, args=args: function(*args), forward


def measure(lengths: tuple[int, ...] = LENGTHS, layers: int = LAYERS, rounds: int = ROUNDS) -> list[dict]:
    """Time all cases and return a row for each: the quartiles of its ratio, and where it was taken."""
    alone = DEVICE.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    rows = []
    for n in lengths:
        for name, call, forward in cases(n, layers):
            call, forward = finished(call), finished(forward)
            for _ in range(2):
                forward(), call()
            rows.append(
                {"case": name, "n": str(n)}
                | paired_ratio(call, forward, rounds, clock)
                | {"rounds": str(rounds), "threads": str(torch.get_num_threads())}
                | {"device": device_name(DEVICE.type), "torch": torch.__version__}
            )
    return rows


def key(row: dict) -> tuple[str, ...]:
    """Return what identifies a row: the case, its length, the machine's kind and the number of threads."""
    return row["case"], row["n"], row["device"], row["threads"]


def slower(row: dict, committed: dict) -> bool:
    """Return whether a row's ratio is above the committed one by more than noise explains."""
    return float(row["ratio_q1"]) > NOISE * float(committed["ratio_q3"])


def read(path: Path) -> dict[tuple[str, ...], dict]:
    """Return the committed rows by their keys, those of all machines."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {key(row): row for row in csv.DictReader(file)}


def save(path: Path, rows: list[dict]) -> None:
    """Replace the rows with the same keys in a file, and keep those of other machines."""
    kept = read(path) | {key(row): row for row in rows}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept.values(), key=lambda row: (row["device"], row["threads"])))


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, and return 1 if a case got slower."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write the numbers instead of comparing them")
    parser.add_argument("--file", type=Path, default=RESULTS, help=f"the committed numbers ({RESULTS.name})")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows, committed = measure(), {} if options.save else read(options.file)
    worse = [row for row in rows if key(row) in committed and slower(row, committed[key(row)])]
    for row in rows:
        ratio, then = (
            f"{r['ratio']} ({r['ratio_q1']} to {r['ratio_q3']})" if r else "none"
            for r in (row, committed.get(key(row)))
        )
        print(
            f"{row['case']:24}{row['n']:>5}  {ratio:24}committed {then}{'  SLOWER' if row in worse else ''}"
        )
    if options.save:
        save(options.file, rows)
    elif not committed.keys() & {key(row) for row in rows}:
        print(
            f"{options.file.name} has no numbers for {rows[0]['device']}; --save writes them", file=sys.stderr
        )
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())

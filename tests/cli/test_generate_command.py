"""`pyglobenc explain --generate` and `--answer`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import Input, words
from models import build
from tiny import VOCABULARY, tokenizer

import pyglobenc
from pyglobenc import explain_generation
from pyglobenc.cli.main import main

TEMPLATE = "{% for m in messages %}{{ m.role }} . {{ m.content }} . {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a small language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    build("llama", vocab_size=len(VOCABULARY)).save_pretrained(folder)
    tokenizer(chat_template=TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Return a function that runs `pyglobenc explain` and returns exit status, output and errors."""

    def run(*args, stdin=None):
        monkeypatch.setattr(sys, "stdin", Input(stdin))
        try:
            status = main(["explain", *args, "--model", folder])
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return run


def test_a_picture_and_every_file(run, folder, tmp_path):
    files = {name: str(tmp_path / f"a.{name}") for name in ("html", "png", "json", "safetensors")}
    status, out, err = run(
        "the good film", *words("--generate 4 --html {} --png {} --json {} --save {}", *files.values())
    )
    assert status == 0 and err == "" and "prompt 5 tokens" in " ".join(out.split())
    a = pyglobenc.load(files["json"])
    assert a == pyglobenc.load(files["safetensors"]) and a.model == folder and len(a) == 4
    model = build("llama", vocab_size=len(VOCABULARY))
    exact = explain_generation(model, tokenizer(), "the good film", max_new_tokens=4)
    assert a.token_ids == exact.token_ids and np.allclose(a.scores, exact.scores, rtol=1e-9, atol=1e-12)
    assert 'class="heat"' in Path(files["html"]).read_text()
    assert Path(files["png"]).read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_method(run):
    options = "--method globenc --generate 2 --dtype float64 --backend reference --json -"
    status, out, _ = run(*words(f"--file - --whole {options}"), stdin=b"the good\nfilm")
    found = json.loads(out)["generation"]
    assert status == 0 and found["method"] == "globenc" and found["settings"]["backend"] == "reference"
    assert found["target_kind"] == "token" and found["text"].startswith("the good\nfilm")
    status, out, _ = run(
        "the", "--answer", "deep film", "--chat", *words("--method saliency --json - --quiet")
    )
    found = json.loads(out)["generation"]
    assert status == 0 and found["tokens"][-2:] == ["deep", "film"] and found["settings"]["answer"] == "given"
    # The template writes no [CLS], which the tokenizer would add to a text.
    assert found["tokens"][:5] == ["u", "##s", "##e", "##r", "."]


@pytest.mark.parametrize(
    "args, status, message",
    [
        ("a --chat", 2, "--chat goes with --generate or --answer"),
        ("a --generate 2 --answer film", 2, "exclude each other"),
        ("a --generate 0", 2, "invalid positive integer value"),
        ("a b --generate 2", 2, "take one text at a time, got 2"),
        ("a --generate 2 --merge-words", 2, "--merge-words doesn't go with"),
        ("a --generate 2 --target 3", 2, "--target doesn't go with"),
        ("a --generate 2 --long windows", 2, "--long doesn't go with"),
        ("a --generate 2 --method lrp", 1, "lrp explains a class of the whole text"),
        ("a --generate 99", 1, "the prompt has 3 tokens and the answer up to 99"),
        ("--image a.png --generate 2", 2, "--generate"),
    ],
)
def test_wrong_usage(run, args, status, message):
    found, out, err = run(*args.split())
    assert found == status and out == "" and message in err and "Traceback" not in err

"""`pyglobenc evaluate --format` compares methods with the human highlights of a data set."""

import csv
import json

import pytest
from command_line import words
from models import build
from tiny import classifier, tokenizer

import pyglobenc
from pyglobenc.cli.main import main
from pyglobenc.evaluate.readers.highlights import read_eraser, read_hatexplain

REVIEWS = {
    "neg.txt": ("the plot is dull ,\nand the film is bad .", "NEG", [(3, 4), (9, 10)]),
    "pos.txt": ("a deep and good film .", "POS", [(1, 4)]),
    "mixed.txt": ("the plot is good . the rest is not .", "NEG", [(8, 9)]),
}
METRICS = ("token-f1", "auprc", "iou-f1", "comprehensiveness")


@pytest.fixture
def model(tmp_path):
    classifier().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def movies(tmp_path):
    folder, lines = tmp_path / "movies data", []
    (folder / "docs").mkdir(parents=True)
    for name, (text, label, spans) in REVIEWS.items():
        (folder / "docs" / name).write_text(text)
        evidences = [[{"docid": name, "start_token": low, "end_token": high}] for low, high in spans]
        lines.append({"annotation_id": name, "classification": label, "query": "?", "evidences": evidences})
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def table(folder) -> dict[tuple[str, str], float]:
    with open(folder / "table.csv", newline="") as file:
        return {(row["method"], row["metric"]): float(row["mean"]) for row in csv.DictReader(file)}


def expected(model, texts, **options) -> dict[tuple[str, str], float]:
    loaded = type(classifier()).from_pretrained(model).eval()
    found = pyglobenc.evaluate(loaded, tokenizer(), texts, progress=False, bootstrap=0, **options)
    return {(row["method"], row["metric"]): row["mean"] for row in found.rows}


def test_eraser(tmp_path, movies, model):
    line = (
        "evaluate --input {} --format eraser --output {} --model {} --methods globenc --quiet --bootstrap 0"
    )
    line += f" --metrics {','.join(METRICS)} --top-k 0.25 --target label --label-names POS,NEG"
    assert main(words(line, movies, tmp_path / "out", model)) == 0
    data = read_eraser(movies)
    options = dict(methods=("globenc",), metrics=METRICS, rationales=data.rationales, top_k=0.25)
    assert table(tmp_path / "out") == pytest.approx(
        expected(model, data.texts, target="label", labels=[1, 0, 1], **options), abs=1e-12
    )


def test_hatexplain_without_labels_of_the_model(tmp_path, model, capsys):
    annotators = [{"label": label} for label in ("offensive", "offensive", "normal")]
    posts = {
        "one": {"post_tokens": ["a", "bad", "film"], "rationales": [[0, 1, 0]], "annotators": annotators},
        "two": {"post_tokens": ["the", "plot"], "rationales": [], "annotators": annotators[1:]},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(posts))
    line = "evaluate --input {} --format hatexplain --output {} --model {} --methods globenc --metrics auprc"
    assert main(words(line + " --quiet --bootstrap 0", tmp_path / "data", tmp_path / "out", model)) == 0
    assert "1 records are left out: no majority label" in capsys.readouterr().err
    data = read_hatexplain(tmp_path / "data")
    options = dict(methods=("globenc",), metrics=("auprc",), rationales=data.rationales)
    assert table(tmp_path / "out") == pytest.approx(expected(model, data.texts, **options))


def test_answers_of_a_language_model(tmp_path):
    generator, names = build("gpt2"), tokenizer()
    generator.save_pretrained(tmp_path / "model")
    names.save_pretrained(tmp_path / "model")
    lines = [{"prompt": "the deep film", "reply": "good"}, {"prompt": "a b c", "reply": "film good"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = "evaluate --input {} --column prompt --answer-column reply --output {} --model {} --quiet"
    line += " --methods globenc --metrics mas,comprehensiveness --remove pad --bootstrap 0"
    paths = tmp_path / "prompts.jsonl", tmp_path / "out", tmp_path / "model"
    assert main(words(line, *paths)) == 0
    found = pyglobenc.evaluate(
        generator,
        names,
        [line["prompt"] for line in lines],
        answers=[line["reply"] for line in lines],
        methods=("globenc",),
        metrics=("mas", "comprehensiveness"),
        remove="pad",
        bootstrap=0,
        progress=False,
    )
    values = {(row["method"], row["metric"]): row["mean"] for row in found.rows}
    assert table(tmp_path / "out") == pytest.approx(values, abs=1e-6, nan_ok=True)
    (tmp_path / "prompts.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps({"prompt": "a"}) + "\n")
    assert main(words(line, paths[0], tmp_path / "other", paths[2])) != 0


@pytest.mark.parametrize(
    "options, message",
    [
        ("--format eraser --split dev", "No such file"),
        ("--format eraser --column text", "--column doesn't belong to --format"),
        ("--format eraser --target label", "a class must be of BAD, GOOD, got 'NEG'"),
        ("--format eraser --label-names POS,NEU", "label 'NEG' of text 0 isn't one of POS, NEU"),
        ("--split test", "--split belongs to --format"),
        ("--format hatexplain", "dataset.json"),
    ],
)
def test_refusals(tmp_path, movies, model, capsys, options, message):
    line = "evaluate --input {} --output {} --model {} --methods random --metrics auprc --quiet " + options
    assert main(words(line, movies, tmp_path / "out", model)) != 0
    assert message in capsys.readouterr().err


def test_the_output_lies_outside_the_data(movies, model, capsys):
    line = "evaluate --input {} --format eraser --output {} --model {}"
    assert main(words(line, movies, movies / "out", model)) != 0
    assert "is read" in capsys.readouterr().err

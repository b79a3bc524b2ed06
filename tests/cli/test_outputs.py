"""No output is written over, or into, a file or folder that a command reads."""

import os

import pytest
import tiny

import pyglobenc
from pyglobenc.cli.main import main
from pyglobenc.common.files import check_apart

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    for name in ("config.json", WEIGHTS, "tokenizer.json", "inner/config.json"):
        (folder / name).write_text(name)
    (tmp_path / "corpus.txt").write_text("a film\n")
    return folder


@pytest.fixture
def never_loaded(monkeypatch):
    """Fail if a command loads a model before it refuses its outputs."""

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pyglobenc.models.pretrained.load_pretrained", load)


def contents(folder):
    return {path: (path.read_bytes(), path.lstat().st_ino) for path in folder.rglob("*") if path.is_file()}


# Each function names the file or folder `name` of a folder in another way.
WAYS = {
    "plain": lambda folder, name: folder / name,
    "dots": lambda folder, name: folder / "inner" / ".." / name,
    "relative": lambda folder, name: os.path.relpath(folder / name),
    "folder link": lambda folder, name: linked(folder, folder.parent / "link") / name,
    "file link": lambda folder, name: linked(
        folder / name, folder.parent / f"link{os.path.splitext(name)[1]}"
    ),
    "dangling link": lambda folder, name: linked(folder / "none.json", folder.parent / "dangling.json"),
}


def linked(target, link):
    if not link.is_symlink():
        link.symlink_to(target)
    return link


def hard(target, link):
    os.link(target, link)
    return link


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "option, name",
    [("--save", WEIGHTS), ("--json", "config.json"), ("--html", "new.html"), ("--png", "inner/a.png")],
)
def test_explain_leaves_the_model_alone(tmp_path, model, never_loaded, capsys, way, option, name):
    before = contents(tmp_path)
    path = str(WAYS[way](model, name))
    assert main(["explain", "a film", "--model", str(model), option, path]) != 0
    error = capsys.readouterr().err
    assert path in error and "which is read" in error and error.count("\n") == 1
    assert contents(tmp_path).items() >= before.items() and not (model / "none.json").exists()


def test_explain_leaves_hard_links_and_inputs_alone(tmp_path, model, never_loaded, capsys):
    before = contents(tmp_path)
    weights, text = (
        hard(model / WEIGHTS, tmp_path / "other.safetensors"),
        hard(tmp_path / "corpus.txt", tmp_path / "same.html"),
    )
    for options in (
        ("a", "--save", str(weights)),
        ("--file", str(tmp_path / "corpus.txt"), "--html", str(text)),
    ):
        assert main(["explain", *options, "--model", str(model)]) != 0
        assert "which is read" in capsys.readouterr().err
    assert contents(tmp_path).items() >= before.items()


def test_explain_leaves_the_weights_alone_that_a_model_links_to(tmp_path, model, never_loaded, capsys):
    (model / WEIGHTS).rename(tmp_path / "blob.safetensors")
    (model / WEIGHTS).symlink_to(tmp_path / "blob.safetensors")
    assert main(["explain", "a", "--model", str(model), "--save", str(tmp_path / "blob.safetensors")]) != 0
    assert (
        "is a file of" in capsys.readouterr().err and (tmp_path / "blob.safetensors").read_text() == WEIGHTS
    )


def test_explain_leaves_the_base_model_of_an_adapter_alone(tmp_path, model, never_loaded, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{model}"}}')
    assert main(["explain", "a", "--model", str(tmp_path / "adapter"), "--save", str(model / WEIGHTS)]) != 0
    assert "which is read" in capsys.readouterr().err


def test_saving_from_python_leaves_the_model_alone(tmp_path):
    tiny.classifier().save_pretrained(tmp_path / "model")
    a = pyglobenc.explain(tiny.classifier(), tiny.tokenizer(), "a film")
    a.model = str(tmp_path / "model")
    before = contents(tmp_path)
    for write in (a.save, a.to_html, a.to_png, pyglobenc.results.Attributions([a]).save):
        with pytest.raises(ValueError, match="which is read"):
            write(tmp_path / "model" / WEIGHTS)
    assert contents(tmp_path) == before
    a.save(tmp_path / "beside.safetensors")
    assert pyglobenc.load(tmp_path / "beside.safetensors") == a


def test_outputs_elsewhere_are_fine(tmp_path, model):
    for output in (tmp_path / "out.json", tmp_path / "model2" / "a.json", tmp_path, "/dev/null"):
        check_apart(output, [model, tmp_path / "corpus.txt", "/dev/null", tmp_path / "missing", "a\0b"])


def attribute(source, output, model):
    return main(
        ["attribute", "--input", str(source), "--output", str(output), "--model", str(model), "--quiet"]
    )


def test_a_corpus_job_leaves_the_model_and_the_input_alone(tmp_path, model, never_loaded, capsys):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    corpus, tables = tmp_path / "corpus.txt", tmp_path / "tables"
    tables.mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tables / "part-000000.parquet")
    (tmp_path / "beside").mkdir()
    hard(corpus, tmp_path / "beside" / "corpus.txt")
    before = contents(tmp_path)
    ways = [WAYS[way] for way in ("plain", "dots", "relative", "folder link")]
    refused = [(corpus, way(model, name)) for way in ways for name in ("inner", "new", WEIGHTS)]
    refused += [
        (corpus, model),
        (corpus, corpus),
        (corpus, tmp_path),
        (corpus, tmp_path / "beside" / "corpus.txt"),
    ]
    refused += [(tables, tables), (tables, tables / "new"), (tables / "part-000000.parquet", tables)]
    refused += [(tables, linked(tables, tmp_path / "tables link"))]
    for source, output in refused:
        assert attribute(source, output, model) == 1
        error = capsys.readouterr().err
        assert "which is read" in error and error.count("\n") == 1, output
    assert contents(tmp_path) == before


def test_a_corpus_job_from_python_leaves_its_input_alone(tmp_path):
    pytest.importorskip("pyarrow")
    from pyglobenc.scale.corpus.job import Plan, make_runner, run_job
    from pyglobenc.scale.corpus.records import open_source

    (tmp_path / "part-000000.parquet.txt").write_text("a film\n")
    source = open_source(tmp_path / "part-000000.parquet.txt")
    with pytest.raises(ValueError, match="which is read"):
        run_job(
            make_runner(tiny.classifier(), tiny.tokenizer()),
            Plan(source, source.path, 4, 64, {}),
            lambda count: None,
        )

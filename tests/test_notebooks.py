"""The notebooks of examples/ run from top to bottom, without a network."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pyglobenc.models.pretrained import model_folder

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NEEDED = ("nbclient", "nbformat", "ipykernel", "pyarrow", "sklearn")


@pytest.mark.slow
@pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    try:
        model_folder("minilm")
    except ValueError as error:
        pytest.skip(str(error))
    for name in ("examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "*.ipynb"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    # The notebooks run `pyglobenc` as a command.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(tmp_path / "examples")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_stored(path):
    text = path.read_text(encoding="utf-8")
    assert '"output_type": "error"' not in text
    assert '"outputs": [\n' in text
    assert "/home/" not in text and "/work/" not in text


def test_there_is_one_for_each_subject():
    assert {path.stem for path in NOTEBOOKS} == {
        "benchmark_your_machine",
        "decoders",
        "long_documents_and_corpora",
        "quickstart",
        "reproduce_globenc",
        "reproduce_transformer_attribution",
    }

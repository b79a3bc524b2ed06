"""`pyglobenc demo`: its options, what it says without Gradio, and what it leaves behind."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from pyglobenc.cli import demo
from pyglobenc.cli.main import INTERRUPTED, main

SPACE = Path(__file__).parents[2] / "examples" / "space"


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 1
    assert "Gradio is not installed: pip install 'pyglobenc[demo]'" in capsys.readouterr().err
    assert not os.path.exists(os.environ["GRADIO_TEMP_DIR"])


@pytest.mark.parametrize("port", ["-1", "0", "65536", "x"])
def test_ports_are_checked(port, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--port", port])
    assert "--port" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_is_served_until_it_is_interrupted(monkeypatch, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'pyglobenc[demo]'")
    from urllib.request import urlopen

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    folders = []

    def interrupt(page):
        folders.append(os.environ["GRADIO_TEMP_DIR"])
        url = capsys.readouterr().out.split()[2]
        assert os.path.isdir(folders[0]) and url.startswith("http://127.0.0.1:")
        with urlopen(url) as answer:
            assert b"pyglobenc" in answer.read()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_wait", interrupt)
    assert main(["demo", "--public", "--model", "minilm"]) == INTERRUPTED
    assert folders and not os.path.exists(folders[0]), "uploads and downloads are deleted"


@pytest.mark.slow
def test_the_space_offers_its_models_alone():
    gradio = pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'pyglobenc[demo]'")
    space = runpy.run_path(str(SPACE / "app.py"), run_name="space")
    assert isinstance(space["demo"], gradio.Blocks)
    offered = [
        [value for _, value in block.choices]
        for block in space["demo"].blocks.values()
        if isinstance(block, gradio.Dropdown) and block.label == "Model"
    ]
    assert offered == [list(space["TEXTS"]), list(space["IMAGES"])]
    assert (SPACE / "requirements.txt").read_text().split() == ["pyglobenc[demo]"]
    head = (SPACE / "README.md").read_text().split("---")[1]
    assert "sdk: gradio" in head and "app_file: app.py" in head

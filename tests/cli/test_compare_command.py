"""`pyglobenc explain TEXT --image FILE`: CLIP compares texts with an image."""

import json
import shutil
import sys
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from command_line import Input, words
from folders import image_folder, text_folder
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from two_streams import clip

import pyglobenc
from pyglobenc import CrossAttribution, explain, explain_image
from pyglobenc.cli.main import main
from pyglobenc.inputs.images import colours
from pyglobenc.results import ImageAttribution

TEXTS = "a cat up", "dogs"
# The ids are those of the model's config: the start of a text is 1 and its end 96.
LETTERS = ["!", "<|startoftext|>", *ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "ca"]
VOCABULARY = ["cat</w>", *(f"unused{i}" for i in range(96 - len(LETTERS) - 1)), "<|endoftext|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a small CLIP with its tokenizer and image processor, as published ones are."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip(torch.float32).save_pretrained(path)
    ids = {token: i for i, token in enumerate([*LETTERS, *VOCABULARY])}
    CLIPTokenizer(vocab=ids, merges=[("c", "a"), ("ca", "t</w>")]).save_pretrained(path)
    size = dict(height=12, width=12)
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(path)
    return str(path)


@pytest.fixture
def run(folder, cat, tmp_path, monkeypatch, capsys):
    """Return a function that runs `pyglobenc explain` with an image in an empty folder.

    It returns exit status, output and errors.
    """
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*args, model=folder, image=cat, stdin=None):
        monkeypatch.setattr(sys, "stdin", Input(stdin))
        try:
            status = main(["explain", *args, "--image", image, "--model", model])
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return run


def called(folder, cat, text):
    """Return what `CrossAttribution` gives for a text and the image, and the model's pixels."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    batch = processor(text=text, images=Image.open(cat), return_tensors="pt")
    return CrossAttribution(model, dtype=torch.float64)(**batch), batch["pixel_values"][0]


def test_scores_are_those_of_the_python_call(run, folder, cat):
    status, out, err = run(*TEXTS, *words("--dtype float64 --save a.safetensors --json a.json"))
    assert status == 0 and not err
    found, maps, labels = pyglobenc.load("a.safetensors"), {}, {}
    assert found == pyglobenc.load("a.json") and [a.text for a in found] == list(TEXTS)
    for index, a in enumerate(found):
        exact, pixels = called(folder, cat, a.text)
        assert np.array_equal(a.scores, exact.scores[0]) and a.scores.any()
        name, value = a.predictions[0]
        assert (name, a.target_name, a.model) == ("similarity", "similarity", folder)
        assert value == float(exact.logit) and a.method == "gradient-rollout"
        assert a.settings["dtype"] == "float64" and a.settings["model_dtype"] == "float32"
        # The image's class token is no patch.
        maps[index] = exact.source_scores[0, 1:].view(3, 3).numpy()
        labels[index] = f"{a.text} ({value:.4g})"
        assert labels[index] in out
    assert [token.removesuffix("</w>") for token in found[0].tokens[1:-1]] == ["a", "cat", "u", "p"]
    assert found[0].special == [True, *[False] * 4, True]
    picture = ImageAttribution(colours(pixels), maps, labels, None, None).to_png()
    assert Path("cat.attribution.png").read_bytes() == picture and "cat.attribution.png" in out


def test_every_output(run, capsys):
    status, out, _ = run("a cat up", *words("--merge-words --html a.html --png b.png"))
    assert status == 0 and sorted(path.name for path in Path().iterdir()) == ["a.html", "b.png"]
    assert "target class similarity" in out and " up\n" in out and out.endswith("b.png\n")
    page = Path("a.html").read_text()
    assert ">cat</span>" in page and page.count('<img src="data:image/png;base64,') == 1
    status, out, _ = run("--file", "-", "--json", "-", stdin=b"a cat up\n\ndogs\n")
    assert status == 0 and [a["text"] for a in json.loads(out)["attributions"]] == list(TEXTS)
    assert run("--whole", "--quiet", stdin=b"a cat up\n") == (0, "", "")
    long = "the cat sat on the mat " * 3
    assert run(long, *words("--long truncate --max-length 9 --save a.json"))[0] == 0
    (a,) = pyglobenc.load("a.json")
    assert len(a) == 9 and a.cut > 9 and a.special[-1]


@pytest.mark.parametrize(
    "args, status, message",
    [
        ("--pair a b", 2, "--pair doesn't go with a text and --image"),
        ("a --target 1", 2, "--target doesn't go with"),
        ("a --start-layer 1", 2, "--start-layer doesn't go with"),
        ("a --generate 3", 2, "--generate doesn't go with"),
        ("a --model-dtype float16", 2, "--model-dtype doesn't go with"),
        ("a --method globenc", 2, "explained by gradient-rollout alone, got 'globenc'"),
        ("a --long windows", 2, "a whole text is compared with the image"),
        ("a --save a.txt", 2, "--save: the file's name must end in"),
        ("a --max-pixels 100", 1, "it has 30 x 40 pixels, and at most 100"),
        ("a --max-length 99", 1, "max_length must be at most 40"),
        ("abcdefghij" * 5, 1, "text has 52 tokens and at most 40 fit"),
        (" ".join(TEXTS) + " --html cat.attribution.png", 2, "named twice"),
    ],
)
def test_wrong_usage(run, args, status, message):
    found, out, err = run(*args.split())
    assert found == status and out == "" and message in err and "Traceback" not in err
    assert not list(Path().iterdir())


def test_a_text_and_an_image_belong_together(run, folder, cat, monkeypatch, capsys):
    needs = "CLIPModel compares a text with an image and needs both"
    assert main(["explain", "a", "--model", folder]) == 1
    assert needs in capsys.readouterr().err
    assert main(["explain", "--image", cat, "--model", folder]) == 1
    assert needs in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", "a", "--image", cat, "other.png", "--model", folder])
    assert "texts are compared with one image, got 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", "a", "--image", cat])
    assert "such as CLIP, with --model" in capsys.readouterr().err
    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match=needs):
        explain(model, processor.tokenizer, "a", "gradient-rollout")
    with pytest.raises(ValueError, match=needs):
        explain_image(model, processor.image_processor, Image.open(cat))


def test_models_that_are_not_clip(run, tmp_path):
    for build, name in ((text_folder, "BertModel"), (image_folder, "ViTModel")):
        model = build(tmp_path / name)
        status, _, err = run("a", model=model)
        assert status == 1 and f"{name} doesn't compare a text with an image; CLIP does" in err


def test_a_part_of_the_model_is_missing(run, folder, tmp_path):
    for part, message in (("tokenizer", "the tokenizer has no vocabulary"), ("preprocessor", "can't load")):
        copy = shutil.copytree(folder, tmp_path / part)
        for file in copy.glob(f"{part}*"):
            file.unlink()
        status, _, err = run("a", model=str(copy))
        assert status == 1 and message in err and err.count("\n") == 1


def test_the_image_and_the_model_are_not_written_over(run, folder, cat):
    before = Path(cat).read_bytes()
    for wrong in (words("a --png {}", cat), words("a --html {}", Path(folder, "a.html"))):
        assert run(*wrong)[0] in (1, 2)
    assert Path(cat).read_bytes() == before and not Path(folder, "a.html").exists()

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import words
from PIL import Image, ImageFile
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pyglobenc.cli.main import main
from pyglobenc.inputs.images import FORMATS, explain_image

SETTINGS = dict(
    image_size=24,
    patch_size=6,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a small ViT classifier with its image processor."""
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SETTINGS, id2label={0: "cat", 1: "dog", 2: "owl"})).save_pretrained(
        path
    )
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "extra, label",
    [
        ([], ""),
        (["--target", "2", "--dtype", "float64"], "owl ("),
        (["--start-layer", "1"], ""),
        (["--method", "lrp"], ""),
        (["--method", "partial-lrp", "--target", "1"], "1: dog ("),
        (["--method", "attention-gradcam"], ""),
        (["--method", "attention-rollout"], "0: [CLS]"),
        (["--method", "globenc", "--target", "mean"], "mean; predicted: "),
    ],
)
def test_image_in_overlay_out(folder, cat, tmp_path, capsys, extra, label):
    out = tmp_path / "out.png"
    command = words(
        "explain --image {} --model {} --method transformer-attribution --png {}", cat, folder, out
    )
    assert main([*command, *extra]) == 0
    assert Image.open(out).width > Image.open(out).height
    printed = capsys.readouterr().out
    assert label in printed and str(out) in printed


def test_refusals(folder, cat, tmp_path, capsys):
    assert main(words("explain --image {} --model {}", tmp_path / "none.png", folder)) == 1
    out = tmp_path / "a.png"
    assert main(words("explain --image {} --model {} --target 3 --png {}", cat, folder, out)) == 1
    assert "target must lie in [0, 3)" in capsys.readouterr().err
    wrongs = "--pair", "--method norms", "--start-layer -1", "--target most", "--html a.html", "--merge-words"
    for wrong in (*wrongs, "--long windows", f"--png {cat}"):
        with pytest.raises(SystemExit):
            main(words("explain --image {} --model {} " + wrong, cat, folder))
    assert Image.open(cat).size == (30, 40)
    with pytest.raises(SystemExit):
        main(["explain", "--image", cat])


def test_a_checkpoint_without_a_head_has_no_classes(folder, cat, tmp_path, capsys):
    ViTForImageClassification.from_pretrained(folder).base_model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "vit")
    command = words("explain --image {} --model {} --png {}", cat, tmp_path / "vit", tmp_path / "out.png")
    assert main([*command, "--method", "transformer-attribution"]) == 1
    assert "the checkpoint lacks classifier.bias, classifier.weight" in capsys.readouterr().err
    for method in ([], ["--method", "globenc"]):
        assert main([*command, *method]) == 0
        assert capsys.readouterr().out.startswith("0: [CLS]\n")


def test_images_that_cannot_be_read(folder, cat, tmp_path, monkeypatch, capsys):
    def fails(path, message):
        assert (
            main(["explain", "--image", str(path), "--model", folder, "--png", str(tmp_path / "out.png")])
            == 1
        )
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and not (tmp_path / "out.png").exists()

    (tmp_path / "half.png").write_bytes(Path(cat).read_bytes()[:1000])
    fails(tmp_path / "half.png", f"can't read image '{tmp_path}/half.png': ")
    # Pillow would clip its values at 255.
    Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    fails(tmp_path / "deep.png", "must have 8 bits a channel")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    fails(cat, "exceeds limit")


@pytest.mark.parametrize("kind", FORMATS)
def test_image_files_whole_and_cut(folder, kind, tmp_path, capsys):
    path, out = tmp_path / "image", str(tmp_path / "out.png")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format=kind)
    command = ["explain", "--image", str(path), "--model", folder, "--png", out]
    assert main(command) == 0
    data = path.read_bytes()
    for length in (0, 1, 20, len(data) // 2):
        path.write_bytes(data[:length])
        capsys.readouterr()
        assert main(command) == 1
        err = capsys.readouterr().err
        assert f"can't read image '{path}': " in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PPM", "ICO", "PCX", "TGA"])
def test_other_formats_are_not_decoded(folder, kind, tmp_path, capsys):
    Image.new("RGB", (40, 30)).save(tmp_path / "image", format=kind)
    assert main(["explain", "--image", str(tmp_path / "image"), "--model", folder]) == 1
    assert "it is none of BMP, GIF, JPEG, PNG, TIFF, WEBP, or damaged" in capsys.readouterr().err


def test_large_images_are_refused_before_they_are_decoded(folder, cat, tmp_path, monkeypatch, capsys):
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    command = ["explain", "--image", str(tmp_path / "large.png"), "--model", folder]
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        assert main(command) == 1
        assert "it has 9000 x 9000 pixels, and at most 67108864" in capsys.readouterr().err
        assert main(["explain", "--image", cat, "--model", folder, "--max-pixels", "1000"]) == 1
        assert "it has 30 x 40 pixels, and at most 1000" in capsys.readouterr().err
        with pytest.raises(ValueError, match="it has 9000 x 9000 pixels"):
            explain_image(
                ViTForImageClassification.from_pretrained(folder),
                ViTImageProcessor(),
                Image.open(tmp_path / "large.png"),
            )


def test_several_images(folder, cat, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (10, 20), "red").save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "--image", cat, "red.png", "--model", folder, "--target", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{cat}: 1: dog (") and printed[1].startswith("red.png: 1: dog (")
    assert printed[2:] == ["cat.attribution.png", "red.attribution.png"]
    one = Image.open("cat.attribution.png")
    assert main(["explain", "--image", cat, "red.png", "--model", folder, "--png", "both.png"]) == 0
    assert Image.open("both.png").size == (one.width, 2 * one.height)
    (tmp_path / "other").mkdir()
    shutil.copy("red.png", "other")
    with pytest.raises(SystemExit):
        main(["explain", "--image", "red.png", "other/red.png", "--model", folder])


def test_labels_do_not_steer_a_terminal(cat, tmp_path, capsys):
    classifier = ViTForImageClassification(ViTConfig(**SETTINGS, id2label={0: "\x1b[31m[red]a$\n", 1: 7}))
    classifier.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    for target, name in (("0", "0: \ufffd[31m[red]a$  ("), ("1", "1: 7 (")):
        paths = cat, tmp_path / "model", target, tmp_path / "a.png"
        assert main(words("explain --image {} --model {} --target {} --png {}", *paths)) == 0
        out, err = capsys.readouterr()
        assert out.startswith(name) and "\x1b" not in out and not err


def test_photographs_are_turned_as_they_say(folder, cat, tmp_path, capsys):
    upright, exif = Image.open(cat), Image.Exif()
    exif[0x0112] = 8  # turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
    for name in ("cat", "turned"):
        paths = tmp_path / f"{name}.png", folder, tmp_path / f"{name}.out.png"
        assert main(words("explain --image {} --model {} --png {} --quiet", *paths)) == 0
    assert (tmp_path / "cat.out.png").read_bytes() == (tmp_path / "turned.out.png").read_bytes()

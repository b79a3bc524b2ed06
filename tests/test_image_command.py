from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pyglobenc.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small ViT classifier with its image processor."""
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    settings = dict(image_size=24, patch_size=6, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    ViTForImageClassification(ViTConfig(**settings, id2label={0: "cat", 1: "dog", 2: "owl"})).save_pretrained(path)
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(path)
    return str(path)


@pytest.fixture
def cat(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    return str(tmp_path / "cat.png")


@pytest.mark.parametrize("extra, label", [([], ""), (["--target", "2", "--dtype", "float64"], "owl (")])
def test_image_in_overlay_out(folder, cat, tmp_path, capsys, extra, label):
    out = tmp_path / "out.png"
    command = ["explain", "--image", cat, "--model", folder, "--method", "transformer-attribution", "--png", str(out), *extra]
    assert main(command) == 0
    assert Image.open(out).width > Image.open(out).height
    printed = capsys.readouterr().out
    assert label in printed and str(out) in printed


def test_refusals(folder, cat, tmp_path, capsys):
    assert main(["explain", "--image", str(tmp_path / "none.png"), "--model", folder]) == 1
    assert main(["explain", "--image", cat, "--model", folder, "--target", "3", "--png", str(tmp_path / "a.png")]) == 1
    assert "target must lie in [0, 3)" in capsys.readouterr().err
    wrongs = (["a text"], ["--method", "norms"], ["--html", "a.html"], ["--merge-words"], ["--long", "windows"], ["--png", cat])
    for wrong in wrongs:
        with pytest.raises(SystemExit):
            main(["explain", "--image", cat, "--model", folder, *wrong])
    assert Image.open(cat).size == (30, 40)
    with pytest.raises(SystemExit):
        main(["explain", "--image", cat])


def test_a_checkpoint_without_a_head_has_no_classes(folder, cat, tmp_path, capsys):
    ViTForImageClassification.from_pretrained(folder).base_model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "vit")
    command = ["explain", "--image", cat, "--model", str(tmp_path / "vit"), "--png", str(tmp_path / "out.png")]
    assert main(command) == 1
    assert "the checkpoint lacks classifier.bias, classifier.weight" in capsys.readouterr().err
    assert main([*command, "--method", "globenc"]) == 0


def test_images_that_cannot_be_read(folder, cat, tmp_path, monkeypatch, capsys):
    def fails(path, message):
        assert main(["explain", "--image", str(path), "--model", folder, "--png", str(tmp_path / "out.png")]) == 1
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and not (tmp_path / "out.png").exists()

    (tmp_path / "half.png").write_bytes(Path(cat).read_bytes()[:1000])
    fails(tmp_path / "half.png", f"can't read image '{tmp_path}/half.png': ")
    # Pillow would cut its values off at 255
    Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    fails(tmp_path / "deep.png", "must have 8 bits a channel")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    fails(cat, "exceeds limit")


def test_photographs_are_turned_as_they_say(folder, cat, tmp_path, capsys):
    upright, exif = Image.open(cat), Image.Exif()
    exif[0x0112] = 8  # turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
    for name in ("cat", "turned"):
        out = str(tmp_path / f"{name}.out.png")
        assert main(["explain", "--image", str(tmp_path / f"{name}.png"), "--model", folder, "--png", out, "--quiet"]) == 0
    assert (tmp_path / "cat.out.png").read_bytes() == (tmp_path / "turned.out.png").read_bytes()

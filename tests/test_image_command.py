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
    for wrong in (["a text"], ["--method", "norms"], ["--html", "a.html"]):
        with pytest.raises(SystemExit):
            main(["explain", "--image", cat, "--model", folder, *wrong])
    with pytest.raises(SystemExit):
        main(["explain", "--image", cat])

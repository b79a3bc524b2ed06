"""Every text architecture from the command line, its checkpoint in a folder."""

import numpy as np
import pytest
import torch
import transformers
from command_line import words
from models import ARCHITECTURES, CAUSAL, IMAGES, PRE_NORM, build
from PIL import Image
from tiny import tokenizer
from transformers import AutoTokenizer, ViTImageProcessor

import pyglobenc
from pyglobenc import GlobEnc
from pyglobenc.cli.main import main
from pyglobenc.inputs.images import explain_image


@pytest.mark.parametrize("name", [*ARCHITECTURES, *PRE_NORM])
def test_explained_from_a_folder(name, tmp_path):
    model = build(name, torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "a.json"
    command = words("explain --model {} {} --json {} --quiet", tmp_path / "model", "deep good film", out)
    assert main(command) == 0
    found = pyglobenc.load(out)
    # what a checkpoint's tokenizer is depends on its architecture too
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "model")("deep good film").input_ids])
    assert found.target == (ids.shape[1] - 1 if name in CAUSAL else 0)
    exact = GlobEnc(model)(input_ids=ids, attention_mask=torch.ones_like(ids)).scores[0, 0]
    torch.testing.assert_close(torch.as_tensor(found.scores), exact, rtol=0, atol=0)


@pytest.mark.parametrize("name", IMAGES)
def test_image_models_say_that_they_take_no_text(name, tmp_path, capsys):
    build(name, torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    assert main(["explain", "--model", str(tmp_path / "model"), "deep good film"]) != 0
    assert "takes pixel_values, not text" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "beit"])
def test_image_explained_from_a_folder(name, tmp_path, capsys):
    config = build(name, torch.float32).config
    kind = type(config).__name__.removesuffix("Config")
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    size = config.image_size
    processor = ViTImageProcessor(size={"height": size, "width": size})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = tmp_path / "map.png"
    image, folder = tmp_path / "a.png", tmp_path / "model"
    arguments = words("explain --image {} --model {} --png {}", image, folder, out)
    assert main([*arguments, "--method", "globenc", "--target", "0"]) == 0
    assert "0: [CLS]" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    found = explain_image(model, processor, Image.open(tmp_path / "a.png"), method="globenc", targets=[0])
    values = torch.as_tensor(processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"])
    patches = found.scores[0].size
    exact = GlobEnc(model)(pixel_values=values, targets=[0]).scores[0, 0, -patches:]
    torch.testing.assert_close(torch.as_tensor(found.scores[0]).flatten(), exact.double(), rtol=0, atol=0)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--method", "nothing"])

"""Every text architecture from the command line, its checkpoint in a folder."""

import pytest
import torch
from models import ARCHITECTURES, CAUSAL, IMAGES, PRE_NORM, build
from tiny import tokenizer
from transformers import AutoTokenizer

import pyglobenc
from pyglobenc import GlobEnc
from pyglobenc.cli import main


@pytest.mark.parametrize("name", [*ARCHITECTURES, *PRE_NORM])
def test_explained_from_a_folder(name, tmp_path):
    model = build(name, torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "a.json"
    assert main(["explain", "--model", str(tmp_path / "model"), "deep good film", "--json", str(out), "--quiet"]) == 0
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

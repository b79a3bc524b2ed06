"""Attribution of images: a small ViT trained on handwritten digits, overlays, pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

from pyglobenc import TransformerAttribution, explain_image
from pyglobenc.viz.image import overlay, to_unit, upscale


@pytest.fixture(scope="module")
def digits():
    """A ViT with 4 x 4 patches of 2 x 2 pixels, trained for some seconds, and 300 digits that it didn't see, (300, 1, 8, 8).

    Ink is 1 and paper -1, as image processors have it.
    """
    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(data.target)[order]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    train = torch.arange(len(images) - 300)
    for _ in range(10):
        for rows in train[torch.randperm(len(train))].split(64):
            loss = model(pixel_values=images[rows], labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), images[-300:], labels[-300:]


def logit(model, pixels, target):
    with torch.no_grad():
        return model(pixel_values=pixels).logits.gather(1, target[:, None])[:, 0]


def without(pixels, patches):
    """Images whose `patches` (B, k) are blank paper."""
    gone = torch.zeros(len(pixels), 16).scatter_(1, patches, 1).view(-1, 1, 4, 4)
    return pixels.masked_fill(gone.repeat_interleave(2, 2).repeat_interleave(2, 3) > 0, -1)


def test_deleting_the_patches_it_names_hurts_most(digits):
    model, images, labels = digits
    right = model(pixel_values=images).logits.argmax(-1) == labels
    assert right.float().mean() > 0.8
    images, labels = images[right][:50], labels[right][:50]
    result = TransformerAttribution(model)(pixel_values=images)
    count = 3  # the top 20 % of 16 patches
    top = result.scores.topk(count, dim=1).indices
    whole = logit(model, images, labels)
    drop = whole - logit(model, without(images, top), labels)
    random = torch.stack([whole - logit(model, without(images, torch.rand(50, 16).topk(count, 1).indices), labels) for _ in range(10)])
    assert (drop > random.mean(0)).float().mean() >= 0.8
    assert drop.mean() > 2 * random.mean()
    # on the strokes: the patches named hold more ink than the others
    ink = torch.nn.functional.avg_pool2d(images, 2).flatten(1)
    assert ink.gather(1, top).mean() > ink.mean() + 0.3


def test_maps_differ_by_class(digits):
    model, images, _ = digits
    a = explain_image(model, None, images[0], targets=[0, 7])
    assert list(a.scores) == [0, 7] and [label.split(" (")[0] for label in a.labels.values()] == ["LABEL_0", "LABEL_7"]
    assert not np.allclose(a.scores[0], a.scores[7], rtol=0.1)
    alone = explain_image(model, None, images[0], targets=[7])
    assert np.allclose(alone.scores[7], a.scores[7], rtol=1e-3)


def test_picture(digits, tmp_path):
    model, images, _ = digits
    a = explain_image(model, None, images[1])
    assert a.predicted in a.scores and a.heat(a.predicted).shape == (8, 8)
    png = a.to_png(tmp_path / "a.png")
    assert png == (tmp_path / "a.png").read_bytes() == a._repr_png_()
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    # white margins, and colours from the overlay
    assert (picture == 255).all(-1).mean() < 0.9 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 30
    full = explain_image(model, None, images[1], variant="full")
    assert full.scores[full.predicted].shape == (8, 8)


@pytest.mark.parametrize("shape, size", [((4, 4), (8, 8)), ((14, 14), (224, 224)), ((3, 5), (10, 7)), ((1, 1), (4, 4))])
def test_upscale_is_bilinear_as_torch_has_it(shape, size):
    scores = np.random.default_rng(0).random(shape)
    exact = torch.nn.functional.interpolate(torch.tensor(scores)[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    assert np.abs(upscale(scores, *size) - exact.numpy()).max() <= 1e-12


def test_overlay_adds_heat_to_the_image():
    image, heat = np.zeros((2, 2, 3)), to_unit(np.array([[0.0, 1.0], [2.0, 4.0]]))
    mixed = overlay(image, heat)
    assert mixed.dtype == np.uint8 and mixed.max() == 255
    assert mixed[0, 0, 2] > mixed[0, 0, 0] and mixed[1, 1, 0] > mixed[1, 1, 2]  # cold is blue, hot is red
    assert (to_unit(np.full((2, 2), 3.0)) == 0).all()

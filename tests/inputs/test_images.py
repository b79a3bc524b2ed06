"""Attribution of images: a small ViT trained on handwritten digits, overlays, pictures."""

import io
from copy import deepcopy

import numpy as np
import pytest
import torch
from models import IMAGES, build
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pyglobenc import GlobEnc, Rollout, TransformerAttribution, explain_image
from pyglobenc.methods.precision.reliability import NoRelevanceWarning
from pyglobenc.methods.registry import METHODS
from pyglobenc.viz.common import contrast
from pyglobenc.viz.image import overlay, to_unit, upscale


@pytest.fixture(scope="module")
def digits():
    """Return a ViT with 4 x 4 patches of 2 x 2 pixels, trained for seconds, and new digits (300, 1, 8, 8).

    Ink is 1 and paper is -1, as image processors make it.
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
    for _ in range(6):
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
    """Return the images with the patches in `patches` (B, k) made blank paper."""
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
    random = torch.stack(
        [
            whole - logit(model, without(images, torch.rand(50, 16).topk(count, 1).indices), labels)
            for _ in range(10)
        ]
    )
    assert (drop > random.mean(0)).float().mean() >= 0.8
    assert drop.mean() > 2 * random.mean()
    # The largest scores lie on the strokes, so these patches hold more ink than the others.
    ink = torch.nn.functional.avg_pool2d(images, 2).flatten(1)
    assert ink.gather(1, top).mean() > ink.mean() + 0.3


def test_maps_differ_by_class(digits):
    model, images, _ = digits
    a = explain_image(model, None, images[0], targets=[0, 7])
    assert list(a.scores) == [0, 7] and [label.split(" (")[0] for label in a.labels.values()] == [
        "LABEL_0",
        "LABEL_7",
    ]
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
    # The picture has white margins, and colours from the overlay.
    assert (picture == 255).all(-1).mean() < 0.9 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 30
    full = explain_image(model, None, images[1], variant="full")
    assert full.scores[full.predicted].shape == (8, 8)


@pytest.mark.parametrize(
    "shape, size", [((4, 4), (8, 8)), ((14, 14), (224, 224)), ((3, 5), (10, 7)), ((1, 1), (4, 4))]
)
def test_upscale_is_bilinear_as_torch_has_it(shape, size):
    scores = np.random.default_rng(0).random(shape)
    exact = torch.nn.functional.interpolate(
        torch.tensor(scores)[None, None], size=size, mode="bilinear", align_corners=False
    )[0, 0]
    assert np.abs(upscale(scores, *size) - exact.numpy()).max() <= 1e-12


def test_overlay_tints_the_image():
    image, values = np.full((2, 2, 3), 0.6), np.array([[0.0, 1.0], [2.0, 4.0]])
    mixed, scale = overlay(image, values)
    assert mixed.dtype == np.uint8 and (scale.norm.vmin, scale.norm.vmax) == (0, 4)
    # Printed in grey, a larger score is darker.
    luminance = [contrast(tuple(mixed.reshape(4, 3)[place].tolist()), (0, 0, 0)) for place in range(4)]
    assert sorted(luminance, reverse=True) == luminance and len(set(luminance)) == 4
    mixed, scale = overlay(image, values - 1)
    assert (scale.norm.vmin, scale.norm.vmax) == (-3, 3)
    assert mixed[0, 0, 2] > mixed[0, 0, 0] and mixed[1, 1, 0] > mixed[1, 1, 2], "blue is below 0"
    assert len(set(mixed[0, 1])) == 1, "0 leaves the grey of the image"
    assert (to_unit(np.full((2, 2), 3.0)) == 0).all()
    for constant in (0.0, 3.0, -3.0):
        assert np.isfinite(overlay(image, np.full((2, 2), constant))[0]).all()


def same(one, other):
    assert (
        one.labels == other.labels
        and one.predicted == other.predicted
        and one.scores.keys() == other.scores.keys()
    )
    assert np.array_equal(one.image, other.image)
    for target, scores in one.scores.items():
        exact = other.scores[target]
        assert np.abs(scores - exact).max() <= 1e-9 * np.abs(exact).max()


@pytest.mark.parametrize("name, method", [*((name, None) for name in IMAGES), ("vit", "attention-rollout")])
def test_a_list_of_images_is_a_batch(name, method):
    model, processor = build(name), ViTImageProcessor(size={"height": 12, "width": 12})
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9 + i, 20, 3), dtype=np.uint8))
        for i in range(3)
    ]
    found = explain_image(model, processor, images, method=method)
    assert isinstance(found, list) and len(found) == 3
    alone = [explain_image(model, processor, image, method=method) for image in images]
    for one, other in zip(found, alone, strict=True):
        same(one, other)
    assert not np.allclose(
        alone[0].scores[next(iter(alone[0].scores))], alone[1].scores.get(next(iter(alone[0].scores)), 0)
    )
    # The images are given as the model's input, and as an array.
    pixels = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in images])
    arrays = np.stack([np.asarray(image.resize((12, 12))) for image in images])
    several = [
        explain_image(model, None, pixels, method=method),
        explain_image(model, None, list(pixels), method=method),
    ]
    for given in several:
        for one, other in zip(given, found, strict=True):
            same(one, other)
    assert len(explain_image(model, processor, arrays, method=method)) == 3


# Methods of post-norm layers, and how they refuse others.
POST_NORM = {"n-resln": "this model normalises before it", "decompx": "normalise before the attention"}
CLASS_METHODS = [name for name, method in METHODS.items() if method.target == "class"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_text_takes_images(method):
    model = build("vit")
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    if method in POST_NORM:
        with pytest.raises(ValueError, match=POST_NORM[method]):
            explain_image(model, None, pixels, method=method)
        return
    found = explain_image(model, None, pixels, method=method)
    for one, image in zip(found, pixels, strict=True):
        same(one, explain_image(model, None, image, method=method))
    targets = None if METHODS[method].target == "class" else torch.zeros(3, dtype=torch.long)
    rows = METHODS[method].run("test", model, "auto", None)({"pixel_values": pixels}, targets)
    for one, row, explained in zip(found, rows.scores, rows.targets.tolist(), strict=True):
        assert list(one.scores) == [explained]
        shape = (3, 3) if row.dim() == 1 else (12, 12)
        exact = row[-9:].view(shape) if row.dim() == 1 else row
        assert np.abs(one.scores[explained] - exact.detach().numpy()).max() <= 1e-12 * float(
            exact.abs().max()
        )


class Pooled(torch.nn.Module):
    """A user's classifier that reads the mean of all tokens."""

    def __init__(self):
        super().__init__()
        self.encoder = build("deit")
        self.classifier = torch.nn.Linear(48, 3).double()

    def forward(self, pixel_values):
        return self.classifier(self.encoder(pixel_values).last_hidden_state.mean(1))


@pytest.mark.parametrize("method", ["globenc", "attention-rollout"])
def test_the_default_target_is_what_the_head_reads(method):
    model = Pooled().eval()
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    read = explain_image(model, None, pixels, method=method)
    rows = Rollout(model, method)(pixel_values=pixels).scores[:, 0]
    for one, named, row in zip(
        read, explain_image(model, None, pixels, method=method, targets="mean"), rows, strict=True
    ):
        assert list(one.labels.items()) == [("mean", "mean")]
        same(one, named)
        assert np.array_equal(one.scores["mean"].ravel(), row[-9:].numpy())
    first = explain_image(model, None, pixels, method=method, targets=[0])
    assert not np.allclose(first[0].scores[0], read[0].scores["mean"])


def test_the_start_layer_and_variants():
    model, pixels = build("vit"), torch.randn(3, 12, 12, dtype=torch.float64)
    attribute = TransformerAttribution(model)
    for start_layer in (0, 1):
        a = explain_image(model, None, pixels, start_layer=start_layer)
        exact = attribute(pixel_values=pixels[None], start_layer=start_layer).scores[0]
        assert np.array_equal(a.scores[a.predicted].ravel(), exact.numpy())
    a = explain_image(model, None, pixels, variant="last_layer")
    exact = attribute(pixel_values=pixels[None], variant="last_layer").scores[0]
    assert np.array_equal(a.scores[a.predicted].ravel(), exact.numpy())
    for wrong in (dict(method="globenc", start_layer=1), dict(method="lrp", start_layer=1)):
        with pytest.raises(ValueError, match="explain_image: start_layer belongs to transformer-attribution"):
            explain_image(model, None, pixels, **wrong)
    with pytest.raises(ValueError, match=r"start_layer must lie in \[0, 3\)"):
        explain_image(model, None, pixels, start_layer=3)
    with pytest.raises(ValueError, match="variant belongs to method='transformer-attribution'"):
        explain_image(model, None, pixels, method="globenc", variant="full")
    with pytest.raises(ValueError, match="explain_image: method must be one of"):
        explain_image(model, None, pixels, method="norms")
    for method in CLASS_METHODS:
        with pytest.raises(TypeError, match="must be classes, got 'mean'"):
            explain_image(model, None, pixels, method=method, targets="mean")


def test_grad_cam_without_a_positive_entry_is_zeros_with_a_note():
    model, pixels = build("vit", num_labels=2), torch.randn(3, 12, 12, dtype=torch.float64)
    # The two classes have opposite weights, so each entry of Grad-CAM is positive for one of them.
    with torch.no_grad():
        model.classifier.weight[1] = -model.classifier.weight[0]
        # One head alone: the attention is positive, so the sign is that of the head's mean gradient.
        for layer in model.vit.layers:
            layer.attention.o_proj.weight[:, 12:] = 0
    with pytest.warns(NoRelevanceWarning, match="reaches any token in 1 of 2 examples, whose scores are 0"):
        a = explain_image(model, None, pixels, method="attention-gradcam", targets=[0, 1])
    assert sorted(float(np.abs(scores).max()) for scores in a.scores.values()) == [0.0, 1.0]


def test_images_of_several_sizes():
    # DINOv2 interpolates its position embeddings.
    model = build("dinov2")
    pixels = [torch.randn(3, size, 12, dtype=torch.float64) for size in (12, 20, 12, 16, 20)]
    found = explain_image(model, None, pixels, targets=[0, 2])
    assert [one.scores[0].shape for one in found] == [(3, 3), (5, 3), (3, 3), (4, 3), (5, 3)]
    for one, given in zip(found, pixels, strict=True):
        same(one, explain_image(model, None, given, targets=[0, 2]))


def test_several_classes_of_several_images(digits):
    model, images = deepcopy(digits[0]).double(), digits[1][:9].double()
    found = explain_image(model, None, images, targets=[3, 1])
    for one, image in zip(found, images, strict=True):
        assert list(one.scores) == [3, 1]
        same(one, explain_image(model, None, image, targets=[3, 1]))


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_labels_are_by_problem_type(kind):
    model = build("vit", num_labels=3)
    model.config.problem_type, model.config.id2label = kind, {0: "cat", 2: 7}
    pixels = torch.randn(3, 12, 12, dtype=torch.float64)
    logits = model(pixels[None]).logits[0].detach()
    a = explain_image(model, None, pixels, targets=[0, 1, 2])
    chances = {
        "single_label_classification": logits.softmax(-1),
        "multi_label_classification": logits.sigmoid(),
    }.get(kind)
    numbers = [f"{x:.4g}" for x in logits] if chances is None else [f"{x:.1%}" for x in chances]
    assert list(a.labels.values()) == [
        f"{name} ({number})" for name, number in zip(("cat", "1", "7"), numbers, strict=True)
    ]
    assert a.predicted == int(logits.argmax())
    if chances is None:
        assert a.probabilities is None
        torch.testing.assert_close(
            torch.tensor([value for _, value in a.predictions], dtype=torch.float64), logits
        )
    else:
        torch.testing.assert_close(torch.tensor(a.probabilities), chances)
    assert len(a.predictions) == {"single_label_classification": 1, "regression": 3}.get(
        kind, int((logits > 0).sum())
    )


@pytest.mark.parametrize("name", ["vit-headless", *(name for name in IMAGES if name != "vit")])
def test_a_model_without_a_head_explains_its_first_token(name):
    model = build("vit").vit if name == "vit-headless" else build(name)
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    exact = GlobEnc(model)(pixel_values=pixels, targets=[0]).scores[:, 0]
    for one, row in zip(explain_image(model, None, pixels), exact, strict=True):
        assert list(one.labels.values()) == ["[CLS]"]
        assert one.probabilities is one.predicted is one.predictions is None
        assert np.array_equal(one.scores[0].ravel(), row[-9:].numpy())
    for method in CLASS_METHODS:
        with pytest.raises(ValueError, match="has no classes to explain; method='globenc' explains its"):
            explain_image(model, None, pixels, method=method)


def test_what_is_no_image_is_refused():
    model = build("vit")
    for image, message in (
        ([], "empty list"),
        (torch.zeros(1, 2, 3, 12, 12), "a batch one more"),
        (torch.zeros(12, 12), "must be a tensor"),
        (np.zeros((3, 12, 12)), "must be a tensor"),
        (torch.zeros(3, 0, 12), "must be a tensor"),
        ("cat.png", "must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            explain_image(model, None, image)
    with pytest.raises(ValueError, match="no target"):
        explain_image(model, None, torch.zeros(3, 12, 12), targets=[])
    with pytest.raises(ValueError, match="takes input_ids, not images"):
        explain_image(build("bert"), None, torch.zeros(3, 12, 12))

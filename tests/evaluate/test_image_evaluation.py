"""Images in `evaluate`: every number against a plain loop, and the published protocols."""

from math import floor

import numpy as np
import pytest
import torch
from models import build
from PIL import Image
from sklearn.metrics import average_precision_score
from transformers import ViTImageProcessor

import pyglobenc
from pyglobenc.evaluate.metrics.segmentation import average_precision
from pyglobenc.methods.registry import METHODS
from pyglobenc.viz.image import upscale

STEPS = [step / 10 for step in range(1, 10)]
# Scores that are equal but for rounding may change places. One of the 1,152 places of the two channels moves
# the average precision by less than this.
PLACE = 1 / 1152
METHOD_NAMES = ("globenc", "transformer-attribution", "lrp", "attention-gradcam")


@pytest.fixture(scope="module")
def model():
    return build("vit", num_labels=3, image_size=24)


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def pictures(count=4):
    """Return images of several sizes, whose masks are rectangles."""
    generator, images, masks = np.random.default_rng(0), [], []
    for index in range(count):
        shape = (30 + index, 50 - index)
        images.append(Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)))
        mask = np.zeros(shape, dtype=np.int8)
        mask[5 : 20 + index, 10:30] = 1
        mask[:3] = -1
        masks.append(mask)
    return images, masks


def prepared(processor, images, masks):
    """Return the model's inputs and the masks as the published script makes them."""
    pixels = torch.cat(
        [processor(images=one, return_tensors="pt")["pixel_values"] for one in images]
    ).double()
    coded = [Image.fromarray((mask + 1).astype(np.uint8)).resize((24, 24), Image.NEAREST) for mask in masks]
    return pixels, [np.asarray(one).astype(int) - 1 for one in coded]


def pixel_map(model, name, pixels, target, start_layer=0):
    """Return a method's scores of the pixels of one image, (24, 24) float64."""
    method = METHODS[name]
    options = {"start_layer": start_layer} if method.has_start_layer else {}
    run = method.build(model, "auto", None, **options)
    rows = run({"pixel_values": pixels[None]}, torch.tensor([target]) if method.target == "class" else None)
    scores = rows.scores[0].detach().numpy()
    # test_images.py compares upscale with torch. Torch's own rounding would split equal scores.
    return scores if scores.ndim == 2 else upscale(scores[-36:].reshape(6, 6), 24, 24)


def chances(model, pixels):
    with torch.no_grad():
        return model(pixel_values=pixels[None]).logits[0].softmax(-1).numpy()


def without(pixels, order, count, blank):
    out = pixels.clone().view(3, -1)
    out[:, order[:count].copy()] = blank
    return out.view_as(pixels)


def test_every_number_equals_a_plain_loop(model, processor):
    images, masks = pictures()
    pixels, fitted = prepared(processor, images, masks)
    metrics = ("comprehensiveness", "positive-perturbation", "negative-perturbation")
    metrics += ("pixel-accuracy", "miou", "map")
    table = pyglobenc.evaluate(
        model,
        processor=processor,
        images=images,
        masks=masks,
        methods=METHOD_NAMES,
        metrics=metrics,
        fractions=(0.1, 0.33),
        progress=False,
        batch_tokens=100,
    )
    for name in METHOD_NAMES:
        for index, image in enumerate(pixels):
            before = chances(model, image)
            target = int(before.argmax())
            scores = pixel_map(model, name, image, target)
            shown = (scores - scores.min()) / (scores.max() - scores.min())
            counted = fitted[index] != -1
            true, found = fitted[index][counted] == 1, (shown > shown.mean())[counted]
            assert table.per_text[name, "pixel-accuracy"][index] == pytest.approx((true == found).mean())
            ious = [(a & b).sum() / (a | b).sum() for a, b in ((~true, ~found), (true, found))]
            assert table.per_text[name, "miou"][index] == pytest.approx(np.mean(ious))
            both = np.concatenate([(1 - shown)[counted], shown[counted]])
            exact = average_precision_score(np.concatenate([~true, true]), both)
            assert table.per_text[name, "map"][index] == pytest.approx(exact, abs=PLACE)
            assert table.per_text[name, "positive-perturbation.0"][index] == pytest.approx(before[target])
    rows = {(row["method"], row["metric"]): row for row in table.rows}
    assert rows["lrp", "miou"]["mean"] == pytest.approx(table.per_text["lrp", "miou"].mean())


def distinct(model):
    """Return images as the model's input whose scores of pixels by LRP are all different."""
    pixels = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    maps = [pixel_map(model, "lrp", one, int(chances(model, one).argmax())) for one in pixels]
    assert all(len(np.unique(one)) == one.size for one in maps)
    return pixels, maps


def test_perturbation_equals_a_plain_loop(model):
    pixels, maps = distinct(model)
    table = pyglobenc.evaluate(
        model,
        images=pixels,
        methods="lrp",
        metrics=("comprehensiveness", "sufficiency", "positive-perturbation", "negative-perturbation"),
        fractions=(0.1, 0.33),
        progress=False,
    )
    for index, (image, scores) in enumerate(zip(pixels, maps, strict=True)):
        before, order = chances(model, image), np.argsort(-scores.ravel())
        target, m = int(before.argmax()), scores.size
        counts = [int(np.ceil(fraction * m)) for fraction in (0.1, 0.33)]
        drops = [before[target] - chances(model, without(image, order, k, 0))[target] for k in counts]
        kept = [
            before[target] - chances(model, without(image, order[::-1], m - k, 0))[target] for k in counts
        ]
        found = {metric: column[index] for (_, metric), column in table.per_text.items()}
        assert found["comprehensiveness"] == pytest.approx(np.mean(drops), abs=1e-9)
        assert found["sufficiency"] == pytest.approx(np.mean(kept), abs=1e-9)
        for sign, ranking in (("positive", order), ("negative", order[::-1])):
            curve = [before[target]] + [
                chances(model, without(image, ranking, int(np.ceil(round(q * m, 9))), 0))[target]
                for q in STEPS
            ]
            own = [found[f"{sign}-perturbation.{q:g}"] for q in (0.0, *STEPS)]
            assert own == pytest.approx(curve, abs=1e-9)
            assert found[f"{sign}-perturbation"] == pytest.approx(np.trapezoid(curve, dx=0.1) / 0.9)


def test_the_published_segmentation(model, processor):
    images, masks = pictures()
    pixels, fitted = prepared(processor, images, masks)
    names = ("transformer-attribution", "partial-lrp", "lrp", "attention-gradcam", "raw-attention")
    table = pyglobenc.evaluate(
        model,
        processor=processor,
        images=images,
        masks=masks,
        methods=names,
        metrics=("pixel-accuracy", "miou", "map"),
        protocol="chefer-segmentation",
        progress=False,
    )
    rows = {(row["method"], row["metric"]): row for row in table.rows}
    assert len(rows) == 3 * len(names)
    for name in names:
        right = labelled = 0
        inter, union, precisions = np.zeros(2), np.zeros(2), []
        for image, mask in zip(pixels, fitted, strict=True):
            # As batch_pix_accuracy, batch_intersection_union and get_ap_scores of the published code.
            scores = pixel_map(model, name, image, int(chances(model, image).argmax()), start_layer=1)
            shown = (scores - scores.min()) / (scores.max() - scores.min())
            predicted, target = (shown > shown.mean()).astype(int) + 1, mask.astype(int) + 1
            labelled += (target > 0).sum()
            right += ((predicted == target) * (target > 0)).sum()
            predicted = predicted * (target > 0)
            same = predicted * (predicted == target)
            areas = [np.histogram(one, bins=2, range=(1, 2))[0] for one in (same, predicted, target)]
            inter, union = inter + areas[0], union + areas[1] + areas[2] - areas[0]
            counted = np.stack([mask, mask]).ravel() != -1
            one_hot = np.stack([mask.clip(0) == 0, mask.clip(0) == 1]).ravel()
            both = np.stack([1 - shown, shown]).ravel()
            precisions.append(average_precision_score(one_hot[counted], both[counted]))
        assert rows[name, "pixel-accuracy"]["mean"] == pytest.approx(right / labelled)
        assert rows[name, "miou"]["mean"] == pytest.approx((inter / union).mean())
        assert rows[name, "map"]["mean"] == pytest.approx(np.mean(precisions), abs=PLACE)
        for metric in ("pixel-accuracy", "miou", "map"):
            assert rows[name, metric]["low"] <= rows[name, metric]["mean"] <= rows[name, metric]["high"]


@pytest.mark.parametrize("target", [None, "label"])
def test_the_published_perturbation(model, target):
    pixels, _ = distinct(model)
    labels = [int(chances(model, pixels[0]).argmax()), 0, 1]
    table = pyglobenc.evaluate(
        model,
        images=pixels,
        labels=labels,
        target=target,
        methods="lrp",
        metrics=("positive-perturbation", "negative-perturbation"),
        protocol="chefer-perturbation",
        progress=False,
    )
    found = {row["metric"]: row["mean"] for row in table.rows}
    for sign in (1, -1):
        curve = np.zeros(10)
        for image, label in zip(pixels, labels, strict=True):
            before = int(chances(model, image).argmax())
            curve[0] += (before == label) / 3
            scores = torch.from_numpy(
                sign * pixel_map(model, "lrp", image, before if target is None else label)
            ).flatten()
            for place, step in enumerate(STEPS, 1):
                _, top = scores.topk(floor(24 * 24 * step))
                curve[place] += (
                    chances(model, without(image, top.numpy(), len(top), 0)).argmax() == label
                ) / 3
        name = {1: "positive", -1: "negative"}[sign] + "-perturbation"
        assert [found[f"{name}.{q:g}"] for q in (0.0, *STEPS)] == pytest.approx(curve.tolist())
        assert found[name] == pytest.approx(curve[1:].mean())
        assert found[f"{name}.area"] == pytest.approx(np.trapezoid(curve[1:], dx=0.1) / 0.8)
        assert found[f"{name}.area-from-0"] == pytest.approx(np.trapezoid(curve, dx=0.1) / 0.9)


def test_removed_pixels_are_black(model):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    processor = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=mean, image_std=std)
    image = Image.new("RGB", (24, 24), (200, 100, 50))
    table = pyglobenc.evaluate(
        model,
        processor=processor,
        images=[image],
        methods="globenc",
        metrics=("sufficiency", "comprehensiveness"),
        fractions=(1.0,),
        progress=False,
    )
    assert table.per_text["globenc", "sufficiency"][0] == pytest.approx(0, abs=1e-9)
    pixels, black = (
        processor(images=one, return_tensors="pt")["pixel_values"][0].double()
        for one in (image, Image.new("RGB", (24, 24)))
    )
    before, after = chances(model, pixels), chances(model, black)
    exact = before.max() - after[before.argmax()]
    # The processor computes in float32.
    assert table.per_text["globenc", "comprehensiveness"][0] == pytest.approx(exact, abs=1e-5)


def test_masks_by_hand(model):
    """One image of 4 patches, whose scores rise from patch to patch, against masks that are known to fit."""
    scores, true = np.array([0.9, 0.8, 0.7, 0.7, 0.1]), np.array([True, False, True, False, False])
    assert average_precision(scores, true) == pytest.approx(average_precision_score(true, scores))
    assert average_precision(scores, np.zeros(5, dtype=bool)) != average_precision(scores, true)
    assert np.isnan(average_precision(scores, np.zeros(5, dtype=bool)))
    # By hand: recall 1/2 at precision 1, and the two equal scores bring recall 1 at precision 2/4.
    assert average_precision(scores, true) == pytest.approx(0.5 * 1 + 0.5 * 0.5)


def test_bad_input(model, processor, tmp_path):
    images, masks = pictures(2)
    right = dict(processor=processor, images=images, masks=masks, methods="globenc", progress=False)

    def fails(error, message, **changes):
        with pytest.raises(error, match=message):
            pyglobenc.evaluate(model, **(right | {"metrics": "miou"} | changes))

    fails(
        ValueError,
        r"mask 2 must have the size of its image, 31 x 49 .*, got 4 x 4",
        masks=[masks[0], np.eye(4) > 0],
    )
    fails(ValueError, "one mask for each of 2 images, got 1", masks=masks[:1])
    fails(ValueError, "miou needs masks .*, and none were given", masks=None)
    fails(
        ValueError,
        "mask 1 must hold 0, 1 and -1 alone, got values from 0 to 7",
        masks=[masks[0] * 0 + 7 * (masks[0] > 0), masks[1]],
    )
    fails(
        TypeError,
        "mask 1 must be .height, width. of bool or integers, got float64",
        masks=[masks[0] * 0.5, masks[1]],
    )
    fails(ValueError, "empty list", images=[], masks=[])
    fails(TypeError, "images must be a list", images=images[0])
    (tmp_path / "image.png").write_bytes(b"no image")
    fails(ValueError, "can't read image", images=[tmp_path / "image.png", images[1]])
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    fails(ValueError, "at most 67108864", images=[tmp_path / "large.png", images[1]])
    fails(TypeError, "words can't be given with images", words=True)
    fails(TypeError, "tokenizer and texts can't be given with images", tokenizer=0, texts=["a"])
    fails(TypeError, "processor and masks can't be given with texts", images=None, tokenizer=0, texts=["a"])
    fails(ValueError, "'eraser' is for texts", protocol="eraser")
    fails(ValueError, "needs start_layer=1, got 0", protocol="chefer-segmentation", start_layer=0)
    fails(ValueError, "needs labels", protocol="chefer-perturbation", metrics="positive-perturbation")
    fails(ValueError, r"a class must lie in \[0, 3\), got 3", labels=[0, 3])
    with pytest.raises(ValueError, match="takes input_ids, not images"):
        pyglobenc.evaluate(build("bert-classifier"), images=[torch.zeros(3, 24, 24)], progress=False)


def test_files_and_palettes_are_masks_too(model, processor, tmp_path):
    images, masks = pictures(2)
    paths = [[tmp_path / f"{kind}{i}.png" for i in range(2)] for kind in ("image", "mask")]
    for index in range(2):
        images[index].save(paths[0][index])
        coded = Image.fromarray((masks[index] == 1).astype(np.uint8))
        coded.putpalette([0, 0, 0, 200, 10, 10] + [0] * 762)
        coded.save(paths[1][index])
    options = dict(processor=processor, methods=("globenc", "random"), metrics="miou", progress=False)
    files = pyglobenc.evaluate(model, images=paths[0], masks=paths[1], **options)
    arrays = pyglobenc.evaluate(model, images=images, masks=[mask == 1 for mask in masks], **options)
    for key, column in arrays.per_text.items():
        assert np.array_equal(column, files.per_text[key])


def test_an_evaluation_of_images_goes_on_where_it_stopped(model, processor, tmp_path):
    images, masks = pictures(3)
    options = dict(processor=processor, images=images, masks=masks, metrics=("miou", "comprehensiveness"))
    options |= dict(methods=("globenc", "random", "lrp"), output=tmp_path, progress=False)
    first = pyglobenc.evaluate(model, **options)
    kept = sorted(path.name for path in (tmp_path / "steps").iterdir())
    next((tmp_path / "steps").glob("method-lrp*")).unlink()
    second = pyglobenc.evaluate(model, **options)
    assert kept == sorted(path.name for path in (tmp_path / "steps").iterdir())
    for key, column in first.per_text.items():
        assert np.array_equal(column, second.per_text[key])
    with pytest.raises(ValueError):
        pyglobenc.evaluate(model, **(options | {"masks": masks[:1] * 1 + [m * 0 for m in masks[1:]]}))

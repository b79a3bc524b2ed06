"""The function `explain_image` takes images and returns the attributions of their patches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyglobenc.common.arguments import known_arguments
from pyglobenc.inputs.pipelines import takes_pipelines
from pyglobenc.results.images import ImageAttribution, ImageAttributions

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn
    from transformers import PreTrainedModel

    from pyglobenc.methods.builders import Run
    from pyglobenc.methods.registry import Method

# The default method explains classes. Models without classes, or whose head has no relevance rules, take the
# second one.
CLASSES, TOKENS = "transformer-attribution", "globenc"
DEFAULT_VARIANT = "transformer_attribution"
# Only formats with widely used decoders are read. Pillow's other formats may contain programs, or their
# decoders are rarely tested.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Several copies of an image are in memory at once, with up to 12 bytes per pixel each.
MAX_PIXELS = 1 << 26
# This many images of one size form a batch.
BATCH = 8


@takes_pipelines
@known_arguments
def explain_image(
    model: PreTrainedModel,
    processor: Any,
    image: Any,
    *,
    method: str | None = None,
    targets: Sequence[int] | str | None = None,
    variant: str = DEFAULT_VARIANT,
    start_layer: int = 0,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageAttribution | ImageAttributions:
    """Compute how much each patch of an image contributes to a model's result.

    Args:
        model: an image model of a known architecture, in evaluation mode. It may be wrapped, as for
            `GlobEnc`. An image-classification pipeline stands for model and processor.
        processor: the model's image processor, or None if the image is already the model's input, a tensor
            (channels, height, width).
        image: a PIL image with 8 bits per channel, which is rotated as its EXIF data says; or what the
            processor takes. A list of images, or an array with one more axis in front, is a batch. Of an
            animation the current frame is explained.
        method: a name in `pyglobenc.methods.registry.METHODS`. Methods that explain a class need a classifier
            of the ViT and DeiT family, others any image encoder. None chooses "transformer-attribution" if
            the model supports it, else "globenc".
        targets: the classes to explain; None for the predicted class. For a method that explains tokens:
            positions of tokens; "mean" for the mean of all tokens' rows; or None for the default of
            `GlobEnc`, which is what the model's head reads.
        variant: of the method "transformer-attribution", as for `TransformerAttribution`.
        start_layer: the lowest layer of the rollout, for methods that have it, as for
            `TransformerAttribution`.
        backend, dtype: as for `GlobEnc`.
        max_pixels: largest number of pixels of an image. A larger image is refused before it is decoded.

    Returns:
        ImageAttribution with a map (rows, columns) or (height, width) for every target. For a batch:
        ImageAttributions, a list in the same order. Each image gets the result that it gets alone.

    Raises:
        TypeError, ValueError: the method, architecture, backend or target is unknown; an image has more than
            8 bits per channel or too many pixels; classes are asked for and the model has no classifier;
            the method has no variants or no start_layer and one is given; or the method refuses the input for
            another reason.
    """
    # These imports take seconds.
    import torch

    from pyglobenc.hf.streams.registry import refuse_comparison
    from pyglobenc.hf.unwrap import called_module, stock_model
    from pyglobenc.methods.builders import relevance
    from pyglobenc.methods.registry import find_method

    called = called_module(model)
    inner = stock_model(called)
    own_head = called is not inner
    refuse_comparison("explain_image", inner)
    if inner.main_input_name != "pixel_values":
        raise ValueError(f"explain_image: {type(inner).__name__} takes {inner.main_input_name}, not images")
    if method is None:
        method = CLASSES if _has_rules(inner, own_head) else TOKENS
    chosen = find_method(method, "explain_image")
    if chosen.target == "class" and inner.base_model is inner and not own_head:
        raise ValueError(
            f"explain_image: {type(inner).__name__} has no classes to explain; method={TOKENS!r} explains "
            f"its [CLS] token"
        )
    targets = _targets(targets, chosen)
    if variant == DEFAULT_VARIANT:
        run = chosen.run("explain_image", model, backend, dtype, start_layer)
    elif method == CLASSES:
        run = relevance(variant, model, backend, dtype, start_layer)
    else:
        raise ValueError(f"explain_image: variant belongs to method={CLASSES!r}; {method} has none")
    if processor is not None and not callable(processor):
        raise TypeError(
            f"explain_image: processor must be the model's image processor or None, got {processor!r:.80}"
        )
    images, single = split_images(image)
    pixels = [model_pixels(inner, processor, one, max_pixels) for one in images]
    done: dict[int, ImageAttribution] = {}
    for rows in batches_of_one_shape(pixels, max(1, BATCH // _count(targets))):
        batch = torch.stack([pixels[row] for row in rows])
        done.update(zip(rows, _explained(called, chosen.target, run, batch, targets), strict=True))
    return done[0] if single else ImageAttributions(done[row] for row in range(len(pixels)))


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image:
    """Read an image file.

    Args:
        path: the file, in one of FORMATS.
        max_pixels: largest number of pixels.

    Returns:
        PIL image; its size is (width, height).

    Raises:
        ValueError: the format is another one, the image is too large, or the file is damaged.
        OSError: the file can't be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # Warnings about a damaged file are dropped, because the error says enough.
        with warnings.catch_warnings(record=True) as found, Image.open(path, formats=FORMATS) as image:
            _check_size(image.size, max_pixels)
            image.load()
        for warning in found:
            warnings.warn(f"image {str(path)!r}: {warning.message}", stacklevel=2)
        return image
    except UnidentifiedImageError:
        raise ValueError(
            f"can't read image {str(path)!r}: it is none of {', '.join(FORMATS)}, or damaged"
        ) from None
    # A file of unknown origin may cause an error of any kind.
    except Exception as error:
        if getattr(error, "strerror", None):
            raise
        raise ValueError(f"can't read image {str(path)!r}: {error}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} pixels, and at most {max_pixels} (max_pixels) are taken; make it "
            f"smaller first"
        )


def split_images(image: Any) -> tuple[list[Any], bool]:
    """Return the images in the argument of `explain_image`, and whether it was a single image."""
    if isinstance(image, (list, tuple)) or getattr(image, "ndim", None) == 4:
        images, single = list(image), False
    else:
        images, single = [image], True
    if not images:
        raise ValueError("explain_image: there is no image, got an empty list")
    for one in images:
        if getattr(one, "ndim", 3) not in (2, 3):
            raise ValueError(
                f"explain_image: an image has 2 or 3 axes, a batch one more; got an array {tuple(one.shape)}"
            )
    return images, single


def model_pixels(model: PreTrainedModel, processor: Any, image: Any, max_pixels: int) -> torch.Tensor:
    """Return the model's input for one image, (channels, height, width)."""
    import torch

    channels = getattr(model.config, "num_channels", 3)
    if processor is None:
        if not isinstance(image, torch.Tensor) or image.ndim != 3 or 0 in image.shape:
            came = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(
                f"explain_image: without a processor an image must be a tensor ({channels}, height, width), "
                f"got {came}"
            )
        pixels = image
    else:
        if hasattr(image, "convert"):
            _check_size(image.size, max_pixels)
            image = _upright(image).convert("RGB" if channels == 3 else "L")
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    parameter = next(model.parameters())
    return pixels.to(parameter.device, parameter.dtype)


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    # Pillow would clip the values of these modes at 255.
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"explain_image: image must have 8 bits a channel, got Pillow's mode {image.mode}; scale it first"
        )
    return ImageOps.exif_transpose(image)


def batches_of_one_shape(pixels: Sequence[torch.Tensor], size: int) -> list[list[int]]:
    """Return the indices of images in groups of one shape, with at most `size` images each."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(pixels):
        shapes.setdefault(tuple(one.shape), []).append(index)
    return [rows[start : start + size] for rows in shapes.values() for start in range(0, len(rows), size)]


def _has_rules(model: PreTrainedModel, own_head: bool) -> bool:
    """Return whether transformer attribution explains this model; own_head: a user's module adds the head."""
    from pyglobenc.hf.architectures import vit

    named = any(cls.__name__.endswith("ForImageClassification") for cls in type(model).__mro__)
    return (named or own_head) and model.config.model_type in vit.MODEL_TYPES


def _targets(targets: Sequence[int] | str | None, method: Method) -> list[int] | str | None:
    from pyglobenc.common.integers import integers

    if isinstance(targets, str):
        if targets != "mean" or method.target == "class":
            wanted = "classes" if method.target == "class" else "token positions or 'mean'"
            raise TypeError(f"explain_image: targets of {method.name} must be {wanted}, got {targets!r}")
        return targets
    if targets is None:
        return None
    targets = integers("explain_image", "targets", targets)
    if targets.dim() != 1:
        raise ValueError(f"explain_image: targets must be a list, got shape {tuple(targets.shape)}")
    if not len(targets):
        raise ValueError("explain_image: there is no target, got an empty list")
    return targets.tolist()


def _count(targets: list[int] | str | None) -> int:
    return len(targets) if isinstance(targets, list) else 1


def _explained(
    model: nn.Module, kind: str, run: Run, pixels: torch.Tensor, targets: list[int] | str | None
) -> list[ImageAttribution]:
    """Return the attributions of images (B, channels, height, width).

    Args:
        model: the model, or the user's module around it.
        kind: "class" or "token", what the targets are.
        run: a method that is built for the model.
        pixels: the images.
        targets: classes or positions, "mean", or None.
    """
    import torch

    from pyglobenc.hf.unwrap import stock_model
    from pyglobenc.methods.inputs import require_finite

    count = _count(targets)
    wanted = (
        torch.tensor(targets * len(pixels), device=pixels.device) if isinstance(targets, list) else targets
    )
    rows = run({"pixel_values": pixels.repeat_interleave(count, 0)}, wanted)
    names = ["mean"] * len(rows.scores) if rows.targets is None else rows.targets.tolist()
    error = None if rows.error is None else rows.error.tolist()
    logits = [None] * len(names)
    if rows.logits is not None and rows.logits.dim() == 2:
        # A NaN weight may affect the logits but not the scores.
        require_finite("explain_image", model, (rows.logits,))
        logits = list(rows.logits.detach().double().cpu())
    stock, out = stock_model(model), []
    for index, image in enumerate(pixels):
        own = range(index * count, (index + 1) * count)
        scores = {names[row]: patch_scores(rows.scores[row], image.shape[1:], stock) for row in own}
        found = {} if error is None else {names[row]: error[row] for row in own}
        out.append(_attribution(stock, image, logits[own[0]], scores, kind == "class", found))
    return out


def _attribution(
    model: PreTrainedModel,
    pixels: torch.Tensor,
    logits: torch.Tensor | None,
    scores: dict[int | str, torch.Tensor],
    classes: bool,
    error: dict[int | str, float],
) -> ImageAttribution:
    from pyglobenc.hf.labels import class_name, predict, probabilities

    chances = None if logits is None else probabilities(model.config, logits)

    def label(target: int | str) -> str:
        if not classes:
            return "[CLS]" if target == 0 else "mean" if target == "mean" else f"token {target}"
        number = f"{logits[target]:.4g}" if chances is None else f"{chances[target]:.1%}"
        return f"{class_name(model.config, target)} ({number})"

    return ImageAttribution(
        image=colours(pixels),
        scores={target: grid.detach().double().cpu().numpy() for target, grid in scores.items()},
        labels={target: label(target) for target in scores},
        probabilities=None if chances is None else chances.numpy(),
        predicted=None if logits is None else int(logits.argmax()),
        predictions=None if logits is None else predict(model.config, logits).predictions,
        error=error,
    )


def patch_scores(scores: torch.Tensor, size: Sequence[int], model: PreTrainedModel) -> torch.Tensor:
    """Return the scores of one image as a map (rows, columns).

    Args:
        scores: (n,), those of special tokens and then of the patches; or (height, width) of the pixels, which
            stay unchanged.
        size: the height and width of the image in pixels.
        model: the image model.
    """
    from pyglobenc.hf.limits import patch_grid

    if scores.dim() == 2:
        return scores
    rows, columns = patch_grid(model, size)
    return scores[-rows * columns :].view(rows, columns)


def colours(pixels: torch.Tensor) -> np.ndarray:
    """Return the model's input (channels, height, width) as (height, width, 3) colours in [0, 1]."""
    shown = pixels.float().cpu()
    low, high = shown.min(), shown.max()
    shown = (shown - low) / (high - low).clamp_min(1e-12)
    shown = shown if shown.shape[0] == 3 else shown[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).numpy()

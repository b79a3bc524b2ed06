"""True segmentations of images: how they are given, and what the model sees of them."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor

from pyglobenc.evaluate.metrics.segmentation import IGNORED
from pyglobenc.inputs.images import MAX_PIXELS, open_image

# How a mask is coded while the image processor resizes it. Processors take no negative numbers.
CODED_IGNORED = 2


def mask_array(mask: Any, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a mask (height, width) int8 of 1 for the object, 0 for the rest, IGNORED for what doesn't count.

    Args:
        mask: a PIL image or the name of a file, in which every value but 0 is the object; or an array or
            tensor (height, width) of bool, or of integers with 0, 1 and -1 for pixels that don't count.
        name: name of the mask for error messages.
        max_pixels: largest number of pixels of a mask.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(mask, str | PathLike):
        mask = open_image(mask, max_pixels)
    if hasattr(mask, "getbands"):
        values = np.asarray(mask)
        if values.ndim == 3 and len(mask.getbands()) == 3 and (values == values[..., :1]).all():
            values = values[..., 0]
        if values.ndim != 2:
            raise ValueError(f"evaluate: {name} must have one channel, got Pillow's mode {mask.mode}")
        return (values != 0).astype(np.int8)
    values = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise TypeError(
            f"evaluate: {name} must be (height, width) of bool or integers, got {values.dtype} {values.shape}"
        )
    if not np.isin(values, (0, 1, IGNORED)).all():
        raise ValueError(
            f"evaluate: {name} must hold 0, 1 and {IGNORED} alone, got values from {values.min()} to "
            f"{values.max()}"
        )
    return values.astype(np.int8)


def fitted_mask(processor: Any, mask: np.ndarray, image: Any, pixels: Tensor, name: str) -> np.ndarray:
    """Return a mask as the model sees the image: resized to its nearest pixels, and cut as the image is.

    Args:
        processor: the model's image processor; None if the images are the model's input.
        mask: (height, width) int8.
        image: the image that it belongs to.
        pixels: (channels, height, width), the model's input for the image.
        name: name of the mask for error messages.

    Raises:
        ValueError: the mask hasn't the size of the image, or the processor mixes its values.
    """
    size = tuple(pixels.shape[1:]) if processor is None else image_size(image)
    if mask.shape != size:
        raise ValueError(
            f"evaluate: {name} must have the size of its image, {size[0]} x {size[1]} (height x width), got "
            f"{mask.shape[0]} x {mask.shape[1]}"
        )
    if processor is None:
        return mask
    from PIL import Image

    coded = np.where(mask == IGNORED, CODED_IGNORED, mask).astype(np.uint8)
    shown = Image.fromarray(np.repeat(coded[..., None], 3, 2)).convert("RGB" if len(pixels) == 3 else "L")
    plain = dict(do_rescale=False, do_normalize=False, resample=Image.Resampling.NEAREST)
    seen = processor(images=shown, return_tensors="np", **plain)["pixel_values"][0][0]
    if seen.shape != tuple(pixels.shape[1:]) or not np.isin(seen, (0, 1, CODED_IGNORED)).all():
        raise ValueError(
            f"evaluate: {type(processor).__name__} can't resize {name} to its nearest pixels; give the "
            f"images as the model's input, with processor=None"
        )
    return np.where(seen == CODED_IGNORED, IGNORED, seen).astype(np.int8)


def image_size(image: Any) -> tuple[int, int]:
    """Return the height and width of an image that a processor takes."""
    if hasattr(image, "getbands"):
        from PIL import ImageOps

        return ImageOps.exif_transpose(image).size[::-1]
    shape = tuple(image.shape)
    # An array with few rows has its channels in front.
    return shape if len(shape) == 2 else shape[1:] if shape[0] in (1, 3) else shape[:2]

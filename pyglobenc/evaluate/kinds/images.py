"""Images as examples: their pixels and masks, their attributions, and copies without some pixels."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyglobenc.evaluate.attributions import RANDOM, Attributed, Progress
from pyglobenc.evaluate.examples import Example, Settings
from pyglobenc.evaluate.forwards import Forwards
from pyglobenc.evaluate.kinds.masks import fitted_mask, mask_array
from pyglobenc.evaluate.kinds.texts import explained_classes
from pyglobenc.hf.limits import patch_grid
from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.inputs.batching import cached_tokens, in_batches
from pyglobenc.inputs.images import (
    MAX_PIXELS,
    batches_of_one_shape,
    model_pixels,
    open_image,
    split_images,
)
from pyglobenc.methods.precision.reliability import NoRelevanceWarning
from pyglobenc.methods.registry import find_method


class Masked(NamedTuple):
    """An image without some of its pixels.

    The tensor of the whole image is shared by all its copies, and a copy is made when its batch runs.
    """

    pixels: Tensor  # (channels, height, width)
    stays: np.ndarray  # (height * width,) bool


def image_list(images: Any) -> list[Any]:
    """Return the images of a call of `evaluate`, none of which is read yet.

    Raises:
        TypeError, ValueError: this is a single image, or there is none.
    """
    found, single = split_images(images)
    if single:
        raise TypeError("evaluate: images must be a list of images, got a single one")
    return found


def black(processor: Any, channels: int) -> list[float]:
    """Return the value of a black pixel in each channel of the model's input; 0 without a processor."""
    if not getattr(processor, "do_normalize", False):
        return [0.0] * channels
    mean, std = (
        np.broadcast_to(np.asarray(getattr(processor, name), dtype=np.float64), channels)
        for name in ("image_mean", "image_std")
    )
    return (-mean / std).tolist()


def image_examples(
    attributor: ImageAttributor,
    forwards: ImageForwards,
    images: Any,
    masks: Any,
    labels: Sequence[int | str] | None,
    target: int | str | None,
) -> tuple[list[Example], str]:
    """Return the examples of images, and a note on how pixels are removed.

    Args:
        attributor, forwards: hold the model and the processor.
        images, masks, labels, target: as for `evaluate`.

    Raises:
        TypeError, ValueError: an image or a mask can't be read or fits no model input, there are more or
            fewer masks or labels than images, or a label or the target is no class.
    """
    model, processor = forwards.model, attributor.processor
    if model.main_input_name != "pixel_values":
        raise ValueError(f"evaluate: {type(model).__name__} takes {model.main_input_name}, not images")
    images = image_list(images)
    if masks is not None and len(masks) != len(images):
        raise ValueError(
            f"evaluate: masks must hold one mask for each of {len(images)} images, got {len(masks)}"
        )
    pixels, fitted = [], []
    # Images are larger than what the model sees of them, so each one is dropped before the next one is read.
    for index, image in enumerate(images):
        name = f"mask {index + 1}"
        if isinstance(image, str | PathLike):
            image = open_image(image)
        pixels.append(model_pixels(model, processor, image, MAX_PIXELS))
        if masks is not None:
            fitted.append(fitted_mask(processor, mask_array(masks[index], name), image, pixels[-1], name))
    chances, truth, targets = explained_classes(forwards, pixels, labels, target, "images")
    examples = []
    for index, one in enumerate(pixels):
        mask = fitted[index] if fitted else None
        units, whole = np.arange(one[0].numel()), None if chances is None else chances[index]
        grid = patch_grid(model, one.shape[1:])
        examples.append(Example(index, one, units, targets[index], whole, truth[index], mask=mask, grid=grid))
    where = "in the model's input" if processor is None else "before the image is normalised"
    size = " and ".join(sorted({f"{one.shape[1]} x {one.shape[2]}" for one in pixels}))
    return examples, f"Images have {size} pixels for the model. A removed pixel is 0 {where}."


class ImageForwards(Forwards):
    """The plain model, which gets images (channels, height, width) or `Masked` ones.

    Args:
        model: an image model, or a module around one.
        batch_tokens: the most patches in a batch. One image may have more.
        processor: the image processor, which tells what a black pixel is in the model's input; or None.
    """

    WHAT = "images"

    def __init__(self, model: nn.Module, batch_tokens: int, processor: Any):
        super().__init__(model, batch_tokens)
        blank = black(processor, getattr(self.model.config, "num_channels", 3))
        self.blank = torch.tensor(blank, dtype=self.model.dtype, device=self.model.device)[:, None, None]

    def logits(self, sequences: Sequence[Any], progress: Progress = lambda count: None) -> np.ndarray:
        """Return the logits of images, (N, classes) float64; see `Forwards.logits`."""
        start = time.perf_counter()
        pixels = [one.pixels if isinstance(one, Masked) else one for one in sequences]
        rows: dict[int, np.ndarray] = {}
        for batch in batches_of_one_shape(pixels, 1 << 30):
            size = images_at_once(self.model, pixels[batch[0]], self.batch_tokens)
            for index, row in in_batches(lambda some: self._run([sequences[i] for i in some]), batch, size):
                rows[index] = row
                progress(1)
        self.asked += len(pixels)
        self.done += len(pixels)
        self.seconds += time.perf_counter() - start
        return np.stack([rows[index] for index in range(len(pixels))])

    def copy(self, example: Example, stays: np.ndarray, settings: Settings) -> Masked:
        """Return an image without some of its pixels, stays (m,) bool."""
        return Masked(example.inputs, stays)

    def _batch(self, sequences: Sequence[Any]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self._copy(one) for one in sequences])}

    def _copy(self, one: Any) -> Tensor:
        if not isinstance(one, Masked):
            return one
        stays = torch.from_numpy(one.stays).to(one.pixels.device).view(one.pixels.shape[1:])
        return torch.where(stays, one.pixels, self.blank)


def images_at_once(model: nn.Module, pixels: Tensor, batch_tokens: int) -> int:
    """Return how many images of a size (channels, height, width) have batch_tokens patches; at least 1."""
    return max(1, batch_tokens // (np.prod(patch_grid(model, pixels.shape[1:])) + 1))


class ImageAttributor:
    """Attributes images by methods of the registry.

    Args:
        model, backend, dtype: as for `pyglobenc.explain_image`. With dtype None, methods that explain a class
            compute in float64.
        processor: the image processor, or None.
        batch_tokens: the most patches that the model gets at once. One image may have more.
        start_layer: the lowest layer of the rollout, for the methods that have it.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        batch_tokens: int,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        start_layer: int = 0,
    ):
        self.model, self.processor = model, processor
        self.batch_tokens = cached_tokens(model, batch_tokens)
        self.backend, self.dtype, self.start_layer = backend, dtype, start_layer

    def of(self, model: nn.Module) -> ImageAttributor:
        """Return an attributor of another model, with the same settings."""
        return ImageAttributor(
            model, self.processor, self.batch_tokens, self.backend, self.dtype, self.start_layer
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the settings of the image processor."""
        settings = None if self.processor is None else self.processor.to_dict()
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()

    def attribute(
        self, method: str, examples: Sequence[Example], progress: Progress = lambda count: None
    ) -> Attributed:
        """Attribute all examples by one method; arguments, result and errors as for `Attributor`.

        The scores are those of the patches of each image, or of its pixels if the method scores pixels.
        """
        if method == RANDOM:
            progress(len(examples))
            return Attributed(None, np.zeros(len(examples) + 1, dtype=np.int64))
        begun, chosen = time.perf_counter(), find_method(method, "evaluate")
        dtype = self.dtype or (torch.float64 if chosen.target == "class" else None)
        start_layer = self.start_layer if chosen.has_start_layer else 0
        run = chosen.run("evaluate", self.model, self.backend, dtype, start_layer)
        stock = stock_model(called_module(self.model))
        if chosen.target == "class" and any(one.target is None for one in examples):
            raise ValueError(f"evaluate: {method} explains a class, and {type(stock).__name__} has none")
        maps: dict[int, np.ndarray] = {}
        reasons: dict[int, ValueError] = {}

        def some(rows: Sequence[int]) -> list[np.ndarray | ValueError]:
            own = [examples[row] for row in rows]
            pixels, classes = torch.stack([one.inputs for one in own]), None
            if chosen.target == "class":
                classes = torch.tensor([one.target for one in own], device=pixels.device)
            try:
                with warnings.catch_warnings():
                    # The table counts examples without relevance.
                    warnings.simplefilter("ignore", NoRelevanceWarning)
                    scores = run({"pixel_values": pixels}, classes).scores
            except ValueError as error:
                return [error] if len(own) == 1 else [some([row])[0] for row in rows]
            found = scores.detach().double().cpu().numpy()
            patches = np.prod(own[0].grid)
            return [row.ravel() if row.ndim == 2 else row[-patches:] for row in found]

        for batch in batches_of_one_shape([one.inputs for one in examples], 1 << 30):
            size = images_at_once(stock, examples[batch[0]].inputs, self.batch_tokens)
            for row, found in in_batches(some, batch, size):
                if isinstance(found, ValueError):
                    reasons[row] = found
                    found = np.full(np.prod(examples[row].grid), np.nan)
                maps[row] = found
                progress(1)
        if len(reasons) == len(examples):
            raise reasons[0]
        ordered = [maps[row] for row in range(len(examples))]
        reason = str(reasons[min(reasons)]).removeprefix("evaluate: ") if reasons else ""
        starts = np.cumsum([0] + [len(one) for one in ordered])
        return Attributed(np.concatenate(ordered), starts, time.perf_counter() - begun, reason)

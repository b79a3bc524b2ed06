"""Images in, attributions of their patches out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyglobenc.files import write_file

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass
class ImageAttribution:
    """Attribution of one image's classes to its patches; in a notebook it shows itself.

    Attributes:
        image: what the model saw, (height, width, 3) in [0, 1].
        scores: by class index, (rows, columns) of patches, or (height, width) of pixels.
        labels: the classes' names.
        probabilities: of every class of the model, (classes,).
        predicted: class index.
        error: by class index, how far rounding moves the scores; see `TransformerAttribution`.
    """

    image: np.ndarray
    scores: dict[int, np.ndarray]
    labels: dict[int, str]
    probabilities: np.ndarray
    predicted: int
    error: dict[int, float] = field(default_factory=dict)

    def heat(self, target: int) -> np.ndarray:
        """Scores of a class at every pixel, bilinear, in [0, 1]: (height, width)."""
        from pyglobenc.viz.image import to_unit, upscale

        return to_unit(upscale(self.scores[target], *self.image.shape[:2]))

    def to_png(self, path: str | Path | None = None) -> bytes:
        """The image and an overlay for every class, as a PNG file, written to path if given."""
        from pyglobenc.viz.image import to_png

        names = {target: f"{self.labels[target]} ({self.probabilities[target]:.1%})" for target in self.scores}
        png = to_png(self.image, {names[target]: self.heat(target) for target in self.scores})
        if path is not None:
            write_file(str(path), png)
        return png

    def _repr_png_(self) -> bytes:
        return self.to_png()


def explain_image(
    model: PreTrainedModel,
    processor: Any,
    image: Any,
    *,
    targets: Sequence[int] | None = None,
    variant: str = "transformer_attribution",
    start_layer: int = 0,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> ImageAttribution:
    """Which patches of an image a classifier's result rests on.

    Args:
        model: ViT or DeiT image classifier, in evaluation mode.
        processor: the model's image processor, or None for an image that is its input already: a tensor (channels, height, width).
        image: a PIL image, or what the processor takes.
        targets: classes explained, None: the predicted one.
        variant, start_layer, backend, dtype: as for `TransformerAttribution`.

    Returns:
        ImageAttribution, with a map for every class.
    """
    import torch

    from pyglobenc.methods.transformer_attribution import TransformerAttribution

    if processor is not None and hasattr(image, "convert"):
        image = image.convert("RGB" if getattr(model.config, "num_channels", 3) == 3 else "L")
    pixels = image[None] if processor is None else processor(images=image, return_tensors="pt")["pixel_values"]
    parameter = next(model.parameters())
    pixels = pixels.to(parameter.device, parameter.dtype)
    attribute = TransformerAttribution(model, backend, dtype)
    batch = pixels if targets is None else pixels.expand(len(targets), -1, -1, -1)
    chosen = None if targets is None else torch.tensor(list(targets), device=pixels.device)
    result = attribute(pixel_values=batch, target=chosen, variant=variant, start_layer=start_layer)
    logits = result.output.logits[0].float()
    classes = result.target.tolist()
    names = getattr(model.config, "id2label", None) or {}
    return ImageAttribution(
        image=_shown(pixels[0]),
        scores={c: _grid(s, pixels.shape[2:], model).double().cpu().numpy() for c, s in zip(classes, result.scores, strict=True)},
        labels={c: str(names.get(c, c)) for c in classes},
        probabilities=logits.softmax(-1).cpu().numpy(),
        predicted=int(logits.argmax()),
        error={} if result.error is None else dict(zip(classes, result.error.tolist(), strict=True)),
    )


def _grid(scores: torch.Tensor, size: Sequence[int], model: PreTrainedModel) -> torch.Tensor:
    """Patches in rows and columns; pixels as they are."""
    if scores.dim() == 2:
        return scores
    patch = model.config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return scores.view(size[0] // height, size[1] // width)


def _shown(pixels: torch.Tensor) -> np.ndarray:
    """The model's input (channels, height, width) moved to [0, 1], grey as colour: (height, width, 3)."""
    shown = pixels.float().cpu()
    low, high = shown.min(), shown.max()
    shown = (shown - low) / (high - low).clamp_min(1e-12)
    shown = shown if shown.shape[0] == 3 else shown[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).numpy()

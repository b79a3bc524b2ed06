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

# the method whose targets are classes
CLASSES = "transformer-attribution"


@dataclass
class ImageAttribution:
    """Attribution of one image's classes, or tokens, to its patches; in a notebook it shows itself.

    Attributes:
        image: what the model saw, (height, width, 3) in [0, 1].
        scores: by target, (rows, columns) of patches, or (height, width) of pixels.
        labels: the targets' names: a class and its probability, or a token.
        probabilities: of every class of the model, (classes,).
        predicted: class index.
        error: by target, how far rounding moves the scores; see `TransformerAttribution`.
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

        png = to_png(self.image, {self.labels[target]: self.heat(target) for target in self.scores})
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
    method: str = "transformer-attribution",
    targets: Sequence[int] | None = None,
    variant: str = "transformer_attribution",
    start_layer: int = 0,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> ImageAttribution:
    """Which patches of an image a classifier's result rests on.

    Args:
        model: an image classifier of a known architecture, in evaluation mode.
        processor: the model's image processor, or None for an image that is its input already: a tensor (channels, height, width).
        image: a PIL image of 8 bits a channel, turned as its EXIF data say, or what the processor takes.
        method: "transformer-attribution" (ViT, DeiT), or a name in `pyglobenc.methods.family.METHODS` (any image encoder).
        targets: classes explained, None: the predicted one; of the rollout family token positions, None: 0, [CLS].
        variant, start_layer: as for `TransformerAttribution`.
        backend, dtype: as for `GlobEnc`.

    Returns:
        ImageAttribution, with a map for every target.

    Raises:
        TypeError, ValueError: unknown method, architecture, backend or target; an image of more than 8 bits a channel; anything else
            that the method refuses.
    """
    if processor is not None and hasattr(image, "convert"):
        image = _upright(image).convert("RGB" if getattr(model.config, "num_channels", 3) == 3 else "L")
    pixels = image[None] if processor is None else processor(images=image, return_tensors="pt")["pixel_values"]
    parameter = next(model.parameters())
    pixels = pixels.to(parameter.device, parameter.dtype)
    if method == CLASSES:
        return _explain_classes(model, pixels, targets, variant, start_layer, backend, dtype)
    return _explain_tokens(model, pixels, [0] if targets is None else list(targets), method, backend, dtype)


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    # Pillow would cut these off at 255
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"explain_image: image must have 8 bits a channel, got Pillow's mode {image.mode}; scale it first")
    return ImageOps.exif_transpose(image)


def _explain_classes(model, pixels: torch.Tensor, targets, variant: str, start_layer: int, backend: str, dtype) -> ImageAttribution:
    import torch

    from pyglobenc.methods.transformer_attribution import TransformerAttribution

    batch = pixels if targets is None else pixels.expand(len(targets), -1, -1, -1)
    chosen = None if targets is None else torch.tensor(list(targets), device=pixels.device)
    attribute = TransformerAttribution(model, backend, dtype)
    result = attribute(pixel_values=batch, target=chosen, variant=variant, start_layer=start_layer)
    classes = result.target.tolist()
    error = {} if result.error is None else dict(zip(classes, result.error.tolist(), strict=True))
    return _attribution(model, pixels, result.output.logits[0], dict(zip(classes, result.scores, strict=True)), True, error)


def _explain_tokens(model, pixels: torch.Tensor, targets: list[int], method: str, backend: str, dtype) -> ImageAttribution:
    from pyglobenc.methods.family import Rollout

    result = Rollout(model, method, backend, dtype)(pixel_values=pixels, targets=targets)
    patch_height, patch_width = _patch(model)
    count = (pixels.shape[2] // patch_height) * (pixels.shape[3] // patch_width)
    # special tokens come first
    scores = {target: row[-count:] for target, row in zip(targets, result.scores[0], strict=True)}
    return _attribution(model, pixels, result.output.logits[0], scores, False, {})


def _attribution(
    model, pixels: torch.Tensor, logits: torch.Tensor, scores: dict[int, torch.Tensor], classes: bool, error: dict[int, float]
) -> ImageAttribution:
    names = getattr(model.config, "id2label", None) or {}
    probabilities = logits.float().softmax(-1).cpu().numpy()
    return ImageAttribution(
        image=_shown(pixels[0]),
        scores={target: _grid(row, pixels.shape[2:], model).double().cpu().numpy() for target, row in scores.items()},
        labels={t: f"{names.get(t, t)} ({probabilities[t]:.1%})" if classes else "[CLS]" if t == 0 else f"token {t}" for t in scores},
        probabilities=probabilities,
        predicted=int(logits.argmax()),
        error=error,
    )


def _patch(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of a patch."""
    patch = model.config.patch_size
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def _grid(scores: torch.Tensor, size: Sequence[int], model: PreTrainedModel) -> torch.Tensor:
    """Patches in rows and columns; pixels as they are."""
    if scores.dim() == 2:
        return scores
    height, width = _patch(model)
    return scores.view(size[0] // height, size[1] // width)


def _shown(pixels: torch.Tensor) -> np.ndarray:
    """The model's input (channels, height, width) moved to [0, 1], grey as colour: (height, width, 3)."""
    shown = pixels.float().cpu()
    low, high = shown.min(), shown.max()
    shown = (shown - low) / (high - low).clamp_min(1e-12)
    shown = shown if shown.shape[0] == 3 else shown[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).numpy()

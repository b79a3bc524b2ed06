"""Attributions of images, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyglobenc.common.files import write_file


@dataclass
class ImageAttribution:
    """Attribution of one image's classes, or tokens, to its patches; in a notebook it shows itself.

    Attributes:
        image: what the model saw, (height, width, 3) in [0, 1].
        scores: by target, (rows, columns) of patches, or (height, width) of pixels.
        labels: the targets' names: a class and its probability, or its plain number of a regression; or a
            token.
        probabilities: of every class of the model, (classes,), by its config's problem_type: softmax, or
            sigmoid. None of a regression and of a model without a classifier.
        predicted: class with the largest logit; None of a model without a classifier.
        predictions: names and probabilities of the classes or labels predicted, most probable first; of a
            regression names and plain numbers of its outputs; None of a model without a classifier.
        error: by target, how far rounding moves the scores; see `TransformerAttribution`.
    """

    image: np.ndarray
    scores: dict[int, np.ndarray]
    labels: dict[int, str]
    probabilities: np.ndarray | None
    predicted: int | None
    predictions: list[tuple[str, float]] | None = None
    error: dict[int, float] = field(default_factory=dict)

    def heat(self, target: int) -> np.ndarray:
        """Scores of a class at every pixel, bilinear, in [0, 1]: (height, width)."""
        from pyglobenc.viz.image import to_unit, upscale

        return to_unit(upscale(self.scores[target], *self.image.shape[:2]))

    def to_png(self, path: str | Path | None = None) -> bytes:
        """The image and an overlay for every class, as a PNG file, written to path if given."""
        return ImageAttributions([self]).to_png(path)

    def _repr_png_(self) -> bytes:
        return self.to_png()


class ImageAttributions(list):
    """Attributions of several images, a list that is pictured together."""

    def to_png(self, path: str | Path | None = None) -> bytes:
        """One PNG file with a row for every image, as `ImageAttribution.to_png` has it; written to path if
        given.
        """
        from pyglobenc.viz.image import to_png

        png = to_png(
            [(one.image, [(one.labels[target], one.heat(target)) for target in one.scores]) for one in self]
        )
        if path is not None:
            write_file(str(path), png)
        return png

    def _repr_png_(self) -> bytes:
        return self.to_png()

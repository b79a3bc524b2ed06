"""Attributions of images and their pictures."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.files import write_file
from pyglobenc.results.attribution import Attributions, write


@dataclass
class ImageAttribution:
    """Attribution of one image's classes or tokens to its patches; a notebook shows it as a picture.

    Attributes:
        image: (height, width, 3) the image that the model read, in [0, 1].
        scores: for each target, (rows, columns) scores of patches, or (height, width) scores of pixels. A
            target is a class, the position of a token, "mean" for the mean of several tokens' rows, or the
            number of a text that the image is compared with.
        labels: for each target, its name: a class with its probability, a regression's output with its value,
            a token, or a text with its similarity.
        probabilities: (classes,) probabilities of the model's classes, by softmax or sigmoid as the config's
            problem_type says. None for a regression and for a model without a classifier.
        predicted: the class with the largest logit; None for a model without a classifier.
        predictions: pairs (name, probability) of the predicted classes or labels, the most probable first.
            For a regression: pairs (name, value) of its outputs. None for a model without a classifier.
        error: for each target, the estimated rounding error of the scores; see `TransformerAttribution`.
    """

    image: np.ndarray = field(repr=False)
    scores: dict[int | str, np.ndarray] = field(repr=False)
    labels: dict[int | str, str]
    probabilities: np.ndarray | None = field(repr=False)
    predicted: int | None
    predictions: list[tuple[str, float]] | None = None
    error: dict[int | str, float] = field(default_factory=dict)

    def heat(self, target: int | str) -> np.ndarray:
        """Return a target's scores at every pixel, (height, width) in [0, 1], by bilinear interpolation."""
        from pyglobenc.viz.image import to_unit

        return to_unit(self._upscaled(target))

    def _upscaled(self, target: int | str) -> np.ndarray:
        from pyglobenc.viz.image import upscale

        return upscale(self.scores[target], *self.image.shape[:2])

    @known_arguments
    def to_png(self, path: str | Path | None = None) -> bytes:
        """Return a PNG picture of the image and of one overlay for each target; write it to path if given."""
        return ImageAttributions([self]).to_png(path)

    def _repr_png_(self) -> bytes:
        return self.to_png()


class ImageAttributions(list):
    """A list of the attributions of several images, which are shown in one picture."""

    @known_arguments
    def to_png(self, path: str | Path | None = None) -> bytes:
        """Return a PNG picture with one row for each image, and write it to path if given."""
        from pyglobenc.viz.image import to_png

        png = to_png(
            [
                (one.image, [(one.labels[target], one._upscaled(target)) for target in one.scores])
                for one in self
            ]
        )
        if path is not None:
            write_file(str(path), png)
        return png

    def _repr_png_(self) -> bytes:
        return self.to_png()


class ComparedAttributions(Attributions):
    """The attributions of texts to their similarity with an image; pictures show the image too.

    Attributes:
        image: the attribution of the image, with scores of its patches for each text.
    """

    image: ImageAttribution

    @known_arguments
    def to_html(
        self, path: str | Path | None = None, merge_words: bool | None = None, columns: int = 1
    ) -> str:
        """Return one HTML page of the image and all texts; arguments as for `Attributions.to_html`."""
        from pyglobenc.viz import html

        picture = b64encode(self.to_png()).decode("ascii")
        heading = (
            f'{html.HEADING}\n<p><img src="data:image/png;base64,{picture}" alt="the image\'s patches"></p>'
        )
        page = html.document(html.fragment(self, merge_words, columns, heading))
        if path is not None:
            write(path, page.encode("utf-8"), self)
        return page

    @known_arguments
    def to_png(self, path: str | Path | None = None) -> bytes:
        """Return a PNG picture of the image and of one overlay for each text; write it to path if given."""
        return self.image.to_png(path)

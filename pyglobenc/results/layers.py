"""The scores of a text in every layer of a model, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.files import write_file
from pyglobenc.results.attribution import Attribution
from pyglobenc.viz.common import caption

# Longer titles would run off the picture.
TITLE = 70


@dataclass(eq=False)
class LayerAttribution:
    """The contributions of the tokens of a text to one target, for every layer of the model.

    Attributes:
        attribution: the attribution of the whole model.
        scores: (L, n), the scores of every layer, the lowest one first. Of a rollout they are the rollout up
            to that layer, and each row's largest entry is 1; of raw attention, the attention of that layer.
            Of transformer attribution they are the relevance of the layer's input.
        log_scale: (L,), the method's own values are scores * exp(log_scale).
        maps: (L, n, n), the matrix that the method multiplies for each layer: row i holds what token i
            receives from every token. None unless they were asked for.
    """

    attribution: Attribution
    scores: np.ndarray = field(repr=False)
    log_scale: np.ndarray = field(repr=False)
    maps: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def at(self, layer: int) -> Attribution:
        """Return the scores of one layer as an attribution; its settings name the layer.

        Raises:
            TypeError, ValueError: layer is no integer in [0, L).
        """
        self._check(layer)
        changed = dict(scores=self.scores[layer], log_scale=float(self.log_scale[layer]))
        return replace(
            self.attribution, settings=self.attribution.settings | {"layer": layer}, error=None, **changed
        )

    @known_arguments
    def to_png(self, path: str | Path | None = None) -> bytes:
        """Return a PNG plot of the tokens' scores along the layers, and write it to path if given.

        Raises:
            OSError: the file can't be written.
        """
        from pyglobenc.viz.plots import layer_curves

        return _written(path, layer_curves(self.scores, self.attribution.tokens, self._title()))

    def map_to_png(self, layer: int, path: str | Path | None = None) -> bytes:
        """Return a PNG heat map of one layer's map, and write it to path if given.

        Raises:
            TypeError, ValueError: the maps were not asked for, or layer is no integer in [0, L).
            OSError: the file can't be written.
        """
        from pyglobenc.viz.plots import heat_map

        if self.maps is None:
            raise ValueError("LayerAttribution: there are no maps; explain_layers(..., maps=True) adds them")
        self._check(layer)
        names, title = self.attribution.tokens, f"{self._title()}   layer {layer}"
        return _written(path, heat_map(self.maps[layer], names, names, title))

    def _repr_png_(self) -> bytes:
        return self.to_png()

    def _title(self) -> str:
        # The model may be a folder with a long name.
        named = [f"{name} {value}" for name, value in caption(self.attribution) if name != "model"]
        return "   ".join(named[:2])[:TITLE]

    def _check(self, layer: int) -> None:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"LayerAttribution: layer must be an integer, got {layer!r}")
        if not 0 <= layer < len(self):
            raise ValueError(f"LayerAttribution: layer must lie in [0, {len(self)}), got {layer}")


def _written(path: str | Path | None, png: bytes) -> bytes:
    if path is not None:
        write_file(path, png)
    return png

"""The map A of one layer, a block of queries at a time: csrc/cpu/relevance_maps.cpp."""

from torch import Tensor

from pyglobenc.backends.cpu._extension import relevance_limits
from pyglobenc.backends.cpu._relevance import query_tiles
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.relevance_tiles import collect_maps


def why_not(inputs: RelevanceInputs, rows: Tensor | None) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.relevance_maps` can't run here; empty if they can."""
    return relevance_limits(inputs)


def run(inputs: RelevanceInputs, rows: Tensor | None) -> Tensor:
    """See `pyglobenc.ops.relevance_maps`: -> (B, n, n), or (B, T, n) with rows."""
    return collect_maps(query_tiles(inputs, rows), inputs, rows)

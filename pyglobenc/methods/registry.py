"""Methods by name, each called the same way: what `pyglobenc.explain` and the command line offer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.methods import family
from pyglobenc.methods.globenc import GlobEnc


@dataclass(frozen=True)
class Rows:
    """One row of scores an example."""

    scores: Tensor  # (B, n), padding 0
    log_scale: Tensor  # (B,), the method's own value is scores * exp(log_scale)
    output: Any  # what the model returned


# of a batch, and targets (B,) int64: token positions or classes
Run = Callable[[Mapping[str, Tensor], Tensor], Rows]


@dataclass(frozen=True)
class Method:
    """An entry of the registry.

    Attributes:
        name: what users call it.
        summary: one line, with the paper.
        build: called with model, backend and dtype as `GlobEnc` takes them; returns what computes the rows of a batch.
        target: "token" if targets are positions, "class" if they are the model's classes.
    """

    name: str
    summary: str
    build: Callable[[PreTrainedModel, str, torch.dtype | None], Run]
    target: str = "token"


def _rollout(name: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> Run:
    """Any method that returns a `RolloutResult`."""
    attribute = GlobEnc(model, backend, dtype) if name == "globenc" else family.Rollout(model, name, backend, dtype)

    def run(batch: Mapping[str, Tensor], targets: Tensor) -> Rows:
        result = attribute(**batch, targets=targets[:, None])
        return Rows(result.scores[:, 0], result.log_scale[:, 0], result.output)

    return run


METHODS = {name: Method(name, summary, partial(_rollout, name)) for name, summary in family.METHODS.items()}


def find_method(name: str) -> Method:
    """The entry of that name.

    Raises:
        ValueError: no such method; the message lists them.
    """
    if name not in METHODS:
        raise ValueError(f"explain: method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]

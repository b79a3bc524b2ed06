"""Sanity checks (Adebayo et al., NeurIPS 2018): do the scores change when the model's weights are random?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pyglobenc.common.rank_correlation import rank_correlation
from pyglobenc.evaluate.examples import Example
from pyglobenc.hf.registry import find_layers
from pyglobenc.hf.unwrap import stock_model

if TYPE_CHECKING:
    from pyglobenc.evaluate.attributions import Attributed, Attributor
    from pyglobenc.evaluate.kept import Kept

NAME = "sanity"


@dataclass(frozen=True)
class Depth:
    """Weights that are randomised in one step.

    Attributes:
        name: "head", "layer 3" (counted from 1 at the input) or "embeddings".
        parameters: names of the model's parameters.
    """

    name: str
    parameters: list[str]


def depths(model: nn.Module) -> list[Depth]:
    """Return the parameters of a model in steps from the top: the head, each layer, and the embeddings.

    The head is everything above the last layer, the embeddings are everything below the first one. Weights
    that several layers share belong to the first of them in the list. Weights that the head shares with the
    embeddings belong to the embeddings. A step without weights is left out.

    Args:
        model: a transformers model of a known architecture, or a wrapper around one.

    Raises:
        TypeError, ValueError: as `find_layers`.
    """
    base = stock_model(model).base_model
    blocks = [layer.block for layer in find_layers(model)]
    steps: dict[int, str] = {}
    for number in range(len(blocks), 0, -1):
        for parameter in blocks[number - 1].parameters():
            steps.setdefault(id(parameter), f"layer {number}")
    # The modules are registered in the order of the forward pass, so those up to the layers feed them.
    children = list(base.children())
    inner = {id(module) for module in blocks}
    last = max(i for i, child in enumerate(children) if inner & {id(module) for module in child.modules()})
    below = [base.parameters(recurse=False), *(child.parameters() for child in children[: last + 1])]
    for parameters in below:
        for parameter in parameters:
            steps.setdefault(id(parameter), "embeddings")
    names = ["head", *(f"layer {number}" for number in range(len(blocks), 0, -1)), "embeddings"]
    found: dict[str, list[str]] = {name: [] for name in names}
    for name, parameter in model.named_parameters():
        found[steps.get(id(parameter), "head")].append(name)
    return [Depth(name, parameters) for name, parameters in found.items() if parameters]


def randomised(model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield a copy of a model with random weights, once for each of its `depths`.

    The first copy has a random head, the next one also a random last layer, and so on. A weight is drawn from
    the normal distribution with the mean and the standard deviation of its own tensor, so that activations
    keep their size, and constant tensors stay as they are. The model itself isn't changed.

    Args:
        model: as for `depths`.
        seed: makes the weights the same in every call.

    Yields:
        The name of the depth, and the copy, which is changed again by the next step.

    Raises:
        ValueError: a weight isn't floating point.
    """
    copy = deepcopy(model)
    weights, generator = dict(copy.named_parameters()), torch.Generator().manual_seed(seed)
    for depth in depths(copy):
        for name in depth.parameters:
            weight = weights[name]
            if not weight.is_floating_point():
                raise ValueError(f"evaluate: sanity needs floating-point weights, {name} is {weight.dtype}")
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
            whole = weight.detach().float()
            # Torch counts this write, so nothing that was computed from the old weight is used again.
            with torch.no_grad():
                weight.copy_(drawn * whole.std(correction=0) + whole.mean())
        yield depth.name, copy


def sanity_checks(
    attributor: Attributor,
    methods: Mapping[str, Attributed],
    examples: Sequence[Example],
    seed: int,
    kept: Kept,
    progress: bool,
) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """Correlate scores with those of models whose weights are random, from the top layer downwards.

    Args:
        attributor: attributes by the model itself.
        methods: the scores of each method for all N examples. Random orders are left out, because they don't
            read the model.
        examples: N texts. The explained classes stay those of the model itself.
        seed: makes the weights the same in every call.
        kept: the finished steps of an earlier run.
        progress: show a progress bar.

    Returns:
        For each method and depth k, counted from 1, the rank correlations (N,) of the units' scores, under
        the name sanity.k; NaN for examples with constant scores or that are refused. And notes on the depths
        and on refusals.
    """
    from tqdm import tqdm

    from pyglobenc.evaluate.attributions import Attributed

    scored = {method: own for method, own in methods.items() if own.tokens is not None}
    found = {method: {} for method in scored}
    names, notes = [depth.name for depth in depths(attributor.model)], []
    total = len(names) * len(scored) * len(examples)
    with tqdm(total=total, desc=NAME, unit="text", disable=not progress) as bar:
        for number, (_, model) in enumerate(randomised(attributor.model, seed), 1):
            for method, own in scored.items():

                def attribute(method: str = method, model: nn.Module = model) -> Any:
                    return attributor.of(model).attribute(method, examples, bar.update).arrays()

                column = found[method][f"{NAME}.{number}"] = np.full(len(examples), np.nan)
                try:
                    other = Attributed(**kept.step(f"{NAME}-{number}-{method}", attribute))
                except ValueError as error:
                    reason = str(error).removeprefix("explain: ")
                    notes.append(f"{method} refuses the random weights of {NAME}.{number}: {reason}.")
                    continue
                for place, example in enumerate(examples):
                    column[place] = _correlation(own, other, example, seed)
    rows = {(method, row): column for method, of_method in found.items() for row, column in of_method.items()}
    steps = ", ".join(f"{NAME}.{number} the {name}" for number, name in enumerate(names, 1))
    return rows, [
        f"Weights are made random from the top, each step keeping the ones before: {steps}.",
        *notes,
    ]


def _correlation(own: Attributed, other: Attributed, example: Example, seed: int) -> float:
    rows = [drawn[0].units for drawn in (own.scores(example, seed), other.scores(example, seed)) if drawn]
    return rank_correlation(*rows) if len(rows) == 2 and example.count > 1 else float("nan")

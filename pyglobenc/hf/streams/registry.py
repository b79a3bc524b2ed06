"""Finds the two streams of a model by its config's model_type."""

from importlib import import_module
from pkgutil import iter_modules

from torch import nn
from transformers import PreTrainedModel

from pyglobenc.hf.streams import architectures
from pyglobenc.hf.streams.modules import Streams

MODULES = [
    import_module(f"{architectures.__name__}.{module.name}")
    for module in iter_modules(architectures.__path__)
]
BINDINGS = {model_type: module for module in MODULES for model_type in module.MODEL_TYPES}


def find_streams(model: nn.Module) -> Streams:
    """Return the layers of a model's two streams.

    Args:
        model: a transformers model of a known architecture. Its layers map hidden states (B, n, d) to
            (B, n, d).

    Raises:
        TypeError: the model is not a transformers model.
        ValueError: the architecture is unknown, or the model lacks one of the streams or the modules of its
            architecture.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"capture: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name, model_type = type(model).__name__, model.config.model_type
    known = f"known architectures of two streams: {', '.join(BINDINGS)}"
    if model_type not in BINDINGS:
        raise ValueError(f"capture: unknown architecture of two streams {model_type!r} ({name}); {known}")
    try:
        found = BINDINGS[model_type].streams(model)
    except AttributeError as error:
        raise ValueError(
            f"capture: {name} has not both streams of its architecture, {model_type!r} ({error})"
        ) from error
    if not found.target or not found.source:
        raise ValueError(f"capture: {name} has no layers in one of its streams")
    return found


def reads_a_source(model: nn.Module) -> bool:
    """Return whether a model is an encoder-decoder of a known architecture that reads token ids."""
    return _kind(model) == "cross" and model.main_input_name == "input_ids"


def compares(model: nn.Module) -> bool:
    """Return whether a model compares texts with images, as CLIP does."""
    return _kind(model) == "similarity"


def refuse_comparison(who: str, model: nn.Module) -> None:
    """Raise ValueError if a model compares texts with images, where `who` has only one of them."""
    if compares(model):
        raise ValueError(
            f"{who}: {type(model).__name__} compares a text with an image and needs both: "
            "pyglobenc.CrossAttribution takes them, and on the command line give the text and --image"
        )


def _kind(model: nn.Module) -> str | None:
    """Return how a model's two streams meet; None for a model without two known streams."""
    try:
        return find_streams(model).kind
    except (TypeError, ValueError):
        return None


def start_token(model: PreTrainedModel) -> int | None:
    """Return the id of the token that a decoder starts with; None if the model's configs name none."""
    for config in (getattr(model, "generation_config", None), model.config):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return start
    return None

"""Which architectures are known, by the config's model_type."""

from importlib import import_module
from pkgutil import iter_modules

from torch import nn
from transformers import PreTrainedModel

from pyglobenc.hf import architectures
from pyglobenc.hf.trace.layers import LayerModules
from pyglobenc.hf.unwrap import stock_model

# Every module of the folder is an architecture. It has MODEL_TYPES and layers(), and DECODER = True if it
# generates text.
MODULES = [
    import_module(f"{architectures.__name__}.{module.name}")
    for module in iter_modules(architectures.__path__)
]
BINDINGS = {model_type: module for module in MODULES for model_type in module.MODEL_TYPES}

# These compute attention themselves. Nothing would be captured, without an error.
IGNORE_THE_INTERFACE = ("deberta",)


def find_layers(model: nn.Module) -> list[LayerModules]:
    """Modules of every layer of a known architecture, first to last.

    Raises:
        TypeError: not a transformers model.
        ValueError: an architecture that isn't known, or that ignores transformers' attention interface.
    """
    model = stock_model(model)
    model_type = model.config.model_type
    known = f"known architectures: {', '.join(BINDINGS)}; docs/add_an_architecture.md says how to add one"
    if model_type in IGNORE_THE_INTERFACE:
        raise ValueError(
            f"capture: {type(model).__name__} ({model_type}) computes attention itself and ignores "
            f"transformers' attention interface, "
            f"so its queries, keys and values can't be captured; {known}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"capture: {type(model).__name__} ({model_type}) is an encoder-decoder, whose cross attention "
            f"is not supported; {known}"
        )
    if model_type not in BINDINGS:
        raise ValueError(f"capture: unknown architecture {model_type!r} ({type(model).__name__}); {known}")
    return BINDINGS[model_type].layers(model.base_model)


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the architecture generates text and so keeps a cache that attribution has no use for."""
    return getattr(BINDINGS.get(model.config.model_type), "DECODER", False)

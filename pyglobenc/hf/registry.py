"""Finds the architecture of a model by its config's model_type."""

from importlib import import_module
from pkgutil import iter_modules

from torch import nn
from transformers import PreTrainedModel

from pyglobenc.hf import architectures
from pyglobenc.hf.trace.layers import LayerModules
from pyglobenc.hf.unwrap import stock_model

# Every module of the folder `architectures` describes one architecture. It has MODEL_TYPES and layers(), and
# DECODER = True if the architecture generates text.
MODULES = [
    import_module(f"{architectures.__name__}.{module.name}")
    for module in iter_modules(architectures.__path__)
]
BINDINGS = {model_type: module for module in MODULES for model_type in module.MODEL_TYPES}

# These architectures compute attention themselves. A capture of them would be empty and raise no error.
IGNORE_THE_INTERFACE = ("deberta",)


def find_layers(model: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer of a model, first to last.

    Args:
        model: a model of a known architecture, or a wrapper that `stock_model` accepts. Its layers map hidden
            states (B, n, d) to (B, n, d).

    Raises:
        TypeError: the model is not a transformers model.
        ValueError: the architecture is unknown, is an encoder-decoder, or ignores transformers' attention
            interface; the model has no layers, or has other modules than its architecture.
    """
    model = stock_model(model)
    model_type = model.config.model_type
    known = f"known architectures: {', '.join(BINDINGS)}; docs/add_an_architecture.md says how to add one"
    if model_type in IGNORE_THE_INTERFACE:
        raise ValueError(
            f"capture: {type(model).__name__} ({model_type}) computes attention itself and ignores "
            f"transformers' attention interface, so its queries, keys and values can't be captured; {known}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"capture: {type(model).__name__} ({model_type}) belongs to an encoder-decoder, which "
            f"CrossAttribution explains if it is complete; {known}"
        )
    if model_type not in BINDINGS:
        raise ValueError(f"capture: unknown architecture {model_type!r} ({type(model).__name__}); {known}")
    try:
        layers = BINDINGS[model_type].layers(model.base_model)
    except AttributeError as error:
        raise ValueError(
            f"capture: {type(model).__name__} has not the modules of the architecture that its config names, "
            f"{model_type!r} ({error})"
        ) from error
    if not layers:
        raise ValueError(f"capture: {type(model).__name__} has no layers, so there is nothing to attribute")
    # An attention module that torch.compile wraps hands itself to the attention function, not its wrapper.
    return [
        layer._replace(attention=layer.attention._orig_mod)
        if "_orig_mod" in layer.attention._modules
        else layer
        for layer in layers
    ]


def is_decoder(model: PreTrainedModel) -> bool:
    """Return whether the model generates text, and so keeps keys and values (B, Hkv, n, dh) in a cache."""
    return getattr(BINDINGS.get(model.config.model_type), "DECODER", False)

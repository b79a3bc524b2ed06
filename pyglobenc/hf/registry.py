"""Which architectures are known, by the config's model_type."""

from torch import nn
from transformers import PreTrainedModel

from pyglobenc.hf.architectures import albert, beit, bert, deberta_v2, dinov2, distilbert, gemma, gpt2, llama, modernbert, mpnet, vit
from pyglobenc.hf.trace.layers import LayerModules
from pyglobenc.hf.unwrap import stock_model

ENCODERS = (bert, distilbert, albert, mpnet, deberta_v2, modernbert, vit, dinov2, beit)
DECODERS = (gpt2, llama, gemma)
BINDINGS = {model_type: binding for binding in (*ENCODERS, *DECODERS) for model_type in binding.MODEL_TYPES}

# these compute attention themselves: nothing would be captured, without an error
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
            f"capture: {type(model).__name__} ({model_type}) computes attention itself and ignores transformers' attention interface, "
            f"so its queries, keys and values can't be captured; {known}"
        )
    if model_type not in BINDINGS:
        raise ValueError(f"capture: unknown architecture {model_type!r} ({type(model).__name__}); {known}")
    return BINDINGS[model_type].layers(model.base_model)


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the architecture generates text and so keeps a cache that attribution has no use for."""
    return BINDINGS.get(model.config.model_type) in DECODERS

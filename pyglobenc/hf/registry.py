"""Which architectures are known, by the config's model_type."""

from torch import nn
from transformers import PreTrainedModel

from pyglobenc.hf import bert, distilbert, vit
from pyglobenc.hf.layers import LayerModules

BINDINGS = {model_type: binding for binding in (bert, distilbert, vit) for model_type in binding.MODEL_TYPES}

# these compute attention themselves: nothing would be captured, without an error
IGNORE_THE_INTERFACE = ("deberta", "deberta-v2", "mpnet")


def find_layers(model: nn.Module) -> list[LayerModules]:
    """Modules of every layer of a known architecture, first to last.

    Raises:
        TypeError: not a transformers model.
        ValueError: an architecture that isn't known, or that ignores transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"capture: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    model_type = model.config.model_type
    if model_type in IGNORE_THE_INTERFACE:
        raise ValueError(
            f"capture: {type(model).__name__} ({model_type}) computes attention itself and ignores transformers' attention interface, "
            f"so its queries, keys and values can't be captured; known architectures: {', '.join(BINDINGS)}"
        )
    if model_type not in BINDINGS:
        raise ValueError(
            f"capture: unknown architecture {model_type!r} ({type(model).__name__}); known architectures: {', '.join(BINDINGS)}"
        )
    return BINDINGS[model_type].layers(model.base_model)

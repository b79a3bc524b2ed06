"""The stock transformers model inside what users wrap around it."""

from torch import nn
from transformers import PreTrainedModel


def stock_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside torch.compile, PEFT or sentence-transformers wrappers; a stock model is returned as it is.

    It shares its modules with the wrapper, adapters included, and runs uncompiled, since compiled code would run without the hooks.

    Raises:
        TypeError: no transformers model is found.
        ValueError: a PEFT method that changes the input (prompts, prefixes), whose tokens the model inside never sees.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            kinds = [config.peft_type for config in inner.peft_config.values() if config.is_prompt_learning]
            if kinds:
                raise ValueError(f"capture: PEFT's {kinds[0]} adds virtual tokens outside the model, which can't be captured")
            inner = inner.get_base_model()
        elif isinstance(inner, nn.Sequential) and len(inner) and hasattr(inner[0], "auto_model"):
            # sentence-transformers: the first module holds the model
            inner = inner[0].auto_model
        else:
            raise TypeError(f"capture: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    return inner

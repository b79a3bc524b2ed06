"""Finds the transformers model inside the wrappers that users put around it."""

from typing import Any

from torch import nn
from transformers import Pipeline, PreTrainedModel


def called_module(model: nn.Module | Pipeline) -> nn.Module:
    """Return the module whose forward pass computes the model's outputs.

    Wrappers that only call the model are removed: torch.compile, DataParallel, PEFT, sentence-transformers
    and a transformers pipeline. The returned module shares its submodules with the wrapper, adapters
    included. It runs uncompiled, because compiled code does not call hooks.

    Returns:
        A stock PreTrainedModel, see `is_stock_model`; or the user's own module, if it contains exactly one.

    Raises:
        TypeError: the module contains no transformers model, or more than one.
        ValueError: a PEFT method adds virtual tokens (prompts, prefixes), which the model never
            sees as its input.
    """
    inner = model
    while not is_stock_model(inner):
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif isinstance(inner, Pipeline):
            inner = inner.model
        elif hasattr(inner, "peft_config"):
            kinds = [config.peft_type for config in inner.peft_config.values() if config.is_prompt_learning]
            if kinds:
                raise ValueError(
                    f"capture: PEFT's {kinds[0]} adds virtual tokens outside the model, which can't be "
                    "captured"
                )
            # PeftMixedModel has no get_base_model.
            inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.base_model.model
        elif isinstance(inner, nn.Sequential) and len(inner) and hasattr(inner[0], "auto_model"):
            if type(inner).__name__ == "CrossEncoder" and len(inner) > 1:
                raise ValueError(
                    f"capture: this CrossEncoder computes its score after the transformers model "
                    f"({type(inner[-1]).__name__}); explain that model itself, model[0].auto_model"
                )
            # The first module of a sentence-transformers model contains the transformers model.
            inner = inner[0].auto_model
        else:
            _only_model(inner, type(model).__name__)
            return inner
    return inner


def stock_model(model: nn.Module | Pipeline) -> PreTrainedModel:
    """Return the transformers model inside `called_module(model)`: that module, or the one it contains.

    Raises:
        TypeError, ValueError: as `called_module`.
    """
    called = called_module(model)
    return called if is_stock_model(called) else _only_model(called, type(called).__name__)


def is_stock_model(model: Any) -> bool:
    """Tell whether a module is a transformers model that has the layers itself, or in its `base_model`.

    A user's class may extend PreTrainedModel and keep a whole model under a name of its own. Such a class
    counts as the user's own module around that model.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    if model.base_model is not model or any(_is_architecture(kind) for kind in type(model).__mro__):
        return True
    return not any(isinstance(module, PreTrainedModel) and module is not model for module in model.modules())


def _is_architecture(kind: type) -> bool:
    """Tell whether a class is a whole model of transformers, not an abstract class such as that of BERT."""
    return kind.__module__.startswith("transformers.models.") and not kind.__name__.endswith(
        "PreTrainedModel"
    )


def _only_model(module: nn.Module, name: str) -> PreTrainedModel:
    """Return the only outermost PreTrainedModel inside a module; errors call the module by `name`."""
    found: dict[int, PreTrainedModel] = {}
    waiting = [module] if isinstance(module, nn.Module) else []
    while waiting:
        for child in waiting.pop().children():
            if isinstance(child, PreTrainedModel):
                found[id(child)] = child
            else:
                waiting.append(child)
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise TypeError(
            f"capture: model must be a transformers PreTrainedModel, or a module around one, got {name}"
        )
    kinds = ", ".join(sorted(type(one).__name__ for one in found.values()))
    raise TypeError(
        f"capture: {name} holds {len(found)} transformers models ({kinds}); capture one of them at a time"
    )

"""What a model can be given: its longest input, its padding.

What its weights must be: readable, and numbers where a result rests on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from pyglobenc.hf.trace.layers import outside

# their position table starts after the padding index
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


def first_position(model: PreTrainedModel) -> int:
    """Position of a text's first token: after the padding index in some tables."""
    return model.base_model.embeddings.padding_idx + 1 if model.config.model_type in OFFSET_POSITIONS else 0


def max_tokens(model: PreTrainedModel) -> int | None:
    """Longest input in tokens, special tokens included; None when the architecture sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else limit - first_position(model)


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids the model has embeddings for."""
    # an adapter around the embeddings doesn't say
    return getattr(model.get_input_embeddings(), "num_embeddings", model.config.vocab_size)


def token_types(model: PreTrainedModel) -> int | None:
    """How many token types the model has embeddings for; None where it looks none up."""
    if model.config.model_type == "gpt2":
        # it adds the embedding of a token
        return vocabulary(model)
    return getattr(model.config, "type_vocab_size", 0) or None


def padding_id(model: PreTrainedModel) -> int | None:
    """Token id that the model's config pads with; None where it names none, or one without an embedding."""
    padding = model.config.get_text_config().pad_token_id
    return padding if padding is not None and 0 <= padding < vocabulary(model) else None


def check_readable(model: nn.Module) -> None:
    """Raise ValueError if a parameter can't be read outside torch.inference_mode; values aren't looked at."""
    # `parameters()` takes ten times as long, a part of a short text's forward pass
    if any(
        p is not None and p.is_inference()
        for module in outside(model, ())
        for p in module._parameters.values()
    ):
        name = next(name for name, parameter in model.named_parameters() if parameter.is_inference())
        raise ValueError(
            f"{type(model).__name__}: parameter {name} was made in torch.inference_mode; load the model "
            f"outside of it"
        )


def not_finite(who: str, model: nn.Module) -> ValueError:
    """Return the error of a result that isn't finite. It names the first parameter that holds NaN or
    infinity, if one does.
    """
    why = _not_a_number(model) or "the model's activations hold NaN or infinity for this input"
    return ValueError(f"{who}: the attribution is not finite; {why}")


@contextmanager
def weights_named(model: nn.Module) -> Iterator[None]:
    """Context within which a ValueError also names the first parameter that holds NaN or infinity: no check
    passes on such numbers.
    """
    try:
        yield
    except ValueError as error:
        found = _not_a_number(model)
        if found is None or found in str(error):
            raise
        raise ValueError(f"{error}; {found}") from error


def _not_a_number(model: nn.Module) -> str | None:
    """Say which parameter holds NaN or infinity, or return None. This takes as long as several forward passes
    of a short text.
    """
    for name, parameter in model.named_parameters():
        # offloaded and quantised weights can't be looked at here
        readable = (
            parameter.is_floating_point()
            and parameter.device.type != "meta"
            and type(parameter.data) is torch.Tensor
        )
        if readable and not torch.isfinite(parameter).all():
            return f"{type(model).__name__}: parameter {name} holds NaN or infinity"
    return None

"""Finds the limits of a model's inputs, and checks its weights.

Weights must be readable. If a result isn't finite, the error names the parameter that holds NaN or infinity.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from pyglobenc.hf.trace.layers import outside

# In these architectures the positions of tokens start after the padding index.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


def first_position(model: PreTrainedModel) -> int:
    """Return the position of the first token of input_ids (B, n): 0, or the one after the padding index."""
    return model.base_model.embeddings.padding_idx + 1 if model.config.model_type in OFFSET_POSITIONS else 0


def max_tokens(model: PreTrainedModel) -> int | None:
    """Return the largest n of input_ids (B, n), special tokens included; None if no limit is set."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else limit - first_position(model)


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of token ids V, the rows of the embedding table (V, d)."""
    # An adapter around the embeddings may lack num_embeddings.
    return getattr(model.get_input_embeddings(), "num_embeddings", model.config.vocab_size)


def token_types(model: PreTrainedModel) -> int | None:
    """Return the number of ids that token_type_ids (B, n) may hold; None if the model does not use them."""
    if model.config.model_type == "gpt2":
        # GPT-2 looks token types up in its table of token embeddings.
        return vocabulary(model)
    return getattr(model.config, "type_vocab_size", 0) or None


def padding_id(model: PreTrainedModel) -> int | None:
    """Return the token id that pads input_ids (B, n); None if the config has none with an embedding."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return padding if padding is not None and 0 <= padding < vocabulary(model) else None


def patch_size(model: PreTrainedModel) -> tuple[int, int]:
    """Return the height and width of an image model's patches in pixels."""
    patch = model.config.patch_size
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def patch_grid(model: PreTrainedModel, size: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of patches of an image, given its height and width in pixels."""
    rows, columns = (whole // part for whole, part in zip(size, patch_size(model), strict=True))
    return rows, columns


def check_readable(model: nn.Module) -> None:
    """Check that every parameter can be read outside torch.inference_mode, without reading its values.

    Raises:
        ValueError: a parameter was created in torch.inference_mode.
    """
    # `parameters()` is ten times slower, which is noticeable beside the forward pass of a short text.
    for module in outside(model, ()):
        for p in module._parameters.values():
            if p is not None and p.is_inference():
                name = next(name for name, parameter in model.named_parameters() if parameter.is_inference())
                raise ValueError(
                    f"{type(model).__name__}: parameter {name} was made in torch.inference_mode; load the "
                    "model outside of it"
                )


def not_finite(who: str, model: nn.Module) -> ValueError:
    """Return the ValueError for an attribution, such as (B, n), that isn't finite.

    It names the first parameter that holds NaN or infinity, if there is one.
    """
    why = _not_a_number(model) or "the model's activations hold NaN or infinity for this input"
    return ValueError(f"{who}: the attribution is not finite; {why}")


@contextmanager
def weights_named(model: nn.Module) -> Iterator[None]:
    """Add to a ValueError raised in the context the first parameter that holds NaN or infinity, if any.

    Checks fail on such parameters, so they are the likely cause of the error.
    """
    try:
        yield
    except ValueError as error:
        found = _not_a_number(model)
        if found is None or found in str(error):
            raise
        raise ValueError(f"{error}; {found}") from error


def _not_a_number(model: nn.Module) -> str | None:
    """Return a sentence that names the first parameter that holds NaN or infinity; None if there is none.

    This takes as long as several forward passes of a short text, so it runs only after an error.
    """
    for name, parameter in model.named_parameters():
        # Offloaded and quantised weights can't be read here.
        readable = (
            parameter.is_floating_point()
            and parameter.device.type != "meta"
            and type(parameter.data) is torch.Tensor
        )
        if readable and not torch.isfinite(parameter).all():
            return f"{type(model).__name__}: parameter {name} holds NaN or infinity"
    return None

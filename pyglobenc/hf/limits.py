"""What a model can be given: its longest input, and weights that are numbers."""

import torch
from transformers import PreTrainedModel

# their position table starts after the padding index
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")


def max_tokens(model: PreTrainedModel) -> int | None:
    """Longest input in tokens, special tokens included; None when the architecture sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and model.config.model_type in OFFSET_POSITIONS:
        limit -= model.config.pad_token_id + 1
    return limit


def check_weights(model: PreTrainedModel) -> None:
    """Raise ValueError if a parameter holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(f"{type(model).__name__}: parameter {name} holds NaN or infinity; no attribution can be computed")

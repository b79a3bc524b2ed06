"""What a model can be given: its longest input. What its weights must be: readable, and numbers where a result rests on them."""

import torch
from transformers import PreTrainedModel

# their position table starts after the padding index: the config's, or the one built in
OFFSET_POSITIONS = {"roberta": None, "xlm-roberta": None, "camembert": None, "mpnet": 1}


def first_position(model: PreTrainedModel) -> int:
    """Position of a text's first token: after the padding index in some tables."""
    if model.config.model_type not in OFFSET_POSITIONS:
        return 0
    padding = OFFSET_POSITIONS[model.config.model_type]
    return (model.config.pad_token_id if padding is None else padding) + 1


def max_tokens(model: PreTrainedModel) -> int | None:
    """Longest input in tokens, special tokens included; None when the architecture sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else limit - first_position(model)


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids the model has embeddings for."""
    # an adapter around the embeddings doesn't say
    return getattr(model.get_input_embeddings(), "num_embeddings", model.config.vocab_size)


def check_readable(model: PreTrainedModel) -> None:
    """Raise ValueError if a parameter can't be read outside torch.inference_mode; values aren't looked at."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        name = next(name for name, parameter in model.named_parameters() if parameter.is_inference())
        raise ValueError(f"{type(model).__name__}: parameter {name} was made in torch.inference_mode; load the model outside of it")


def not_finite(who: str, model: PreTrainedModel) -> ValueError:
    """Return the error of a result that isn't finite. It names the first parameter that holds NaN or infinity, if one does."""
    for name, parameter in model.named_parameters():
        # offloaded and quantised weights can't be looked at here
        readable = parameter.is_floating_point() and parameter.device.type != "meta" and type(parameter.data) is torch.Tensor
        if readable and not torch.isfinite(parameter).all():
            return ValueError(f"{who}: the attribution is not finite; {type(model).__name__}: parameter {name} holds NaN or infinity")
    return ValueError(f"{who}: the attribution is not finite; the model's activations hold NaN or infinity for this input")

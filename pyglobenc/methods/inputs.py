"""Checks of a batch before the model sees it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.hf.limits import max_tokens


def check_batch(who: str, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raise on what transformers would refuse obscurely, or take silently.

    Args:
        who: method named in errors.
        model: the model that gets the batch.
        batch: its inputs; input_ids (B, n), attention_mask (B, n).

    Raises:
        TypeError, ValueError: training mode, no input, wrong shapes, empty or too long text, an example without a real token.
    """
    if model.training:
        raise ValueError(f"{who}: the model is in training mode, where dropout changes the result; call model.eval() first")
    ids = batch.get("input_ids", batch.get("inputs_embeds"))
    if ids is None:
        raise ValueError(f"{who}: the batch has neither input_ids nor inputs_embeds, got {', '.join(batch) or 'nothing'}")
    if not isinstance(ids, Tensor):
        raise TypeError(f"{who}: input_ids must be a tensor (B, n), got {type(ids).__name__}; ask the tokenizer for return_tensors='pt'")
    if ids.dim() not in (2, 3) or 0 in ids.shape[:2]:
        raise ValueError(f"{who}: input_ids must be (B, n) with at least one example and one token, got {tuple(ids.shape)}")
    limit = max_tokens(model)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(
            f"{who}: the input has {ids.shape[1]} tokens and the model takes {limit}; truncate it (truncation=True) or split it into windows"
        )
    mask = batch.get("attention_mask")
    if mask is not None:
        if tuple(mask.shape) != tuple(ids.shape[:2]):
            raise ValueError(f"{who}: attention_mask must be (B, n) = {tuple(ids.shape[:2])}, got {tuple(mask.shape)}")
        if not mask.bool().any(1).all():
            raise ValueError(f"{who}: an example has no real token (its attention_mask is all 0)")

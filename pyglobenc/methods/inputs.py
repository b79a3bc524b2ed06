"""From a batch to captured layers: everything is checked before and while the model sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyglobenc.backends import check_backend
from pyglobenc.hf import LayerTrace, capture, find_layers
from pyglobenc.hf.limits import check_weights, max_tokens
from pyglobenc.methods.precision import set_precision


def check_model(who: str, model: PreTrainedModel, backend: str, dtype: torch.dtype | None) -> None:
    """Raise TypeError or ValueError, naming who, unless the model's architecture, its weights, the backend and the dtype will do."""
    check_backend(backend, who)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"{who}: dtype must be None, torch.float32 or torch.float64, got {dtype}")
    find_layers(model)
    check_weights(model)


def run_captured(who: str, model: PreTrainedModel, batch: Mapping[str, Any], dtype: torch.dtype | None) -> tuple[list[LayerTrace], Any]:
    """Check a batch, run the model on it, and return its layers, in the precision asked for, and its output."""
    check_batch(who, model, batch)
    with capture(model) as trace:
        output = model(**batch)
    set_precision(trace.layers, dtype)
    return trace.layers, output


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
            f"{who}: the input has {ids.shape[1]} tokens and the model takes {limit}; "
            "truncate it (truncation=True) or split it into windows"
        )
    mask = batch.get("attention_mask")
    if mask is not None:
        if tuple(mask.shape) != tuple(ids.shape[:2]):
            raise ValueError(f"{who}: attention_mask must be (B, n) = {tuple(ids.shape[:2])}, got {tuple(mask.shape)}")
        if not mask.bool().any(1).all():
            raise ValueError(f"{who}: an example has no real token (its attention_mask is all 0)")


def target_rows(who: str, targets: Sequence[int] | Tensor, layer: LayerTrace) -> Tensor:
    """Targets as (B, T) int64, checked.

    Args:
        who: method named in errors.
        targets: T positions for every example, or (B, T), each in [0, n) and not padding.
        layer: any captured layer, for B, n and the padding.

    Raises:
        TypeError, ValueError: not integers, empty, out of range, padding, or of another batch.
    """
    batch, _, n, _ = layer.q.shape
    rows = torch.as_tensor(targets, device=layer.q.device)
    if rows.numel() and (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool):
        raise TypeError(f"{who}: targets must be integers, got {rows.dtype}")
    if rows.dim() == 1:
        rows = rows.expand(batch, -1)
    if rows.dim() != 2 or rows.shape[0] != batch or rows.shape[1] == 0:
        raise ValueError(f"{who}: targets must be T positions or (B, T) with B={batch} and T at least 1, got {tuple(rows.shape)}")
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(f"{who}: targets must lie in [0, {n}), got {int(rows.min())} to {int(rows.max())}")
    rows = rows.long()
    if layer.key_mask is not None and not layer.key_mask.gather(1, rows).all():
        raise ValueError(f"{who}: a target is a padding token")
    return rows

"""From a batch to captured layers. The batch is checked before the model runs and while it runs."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyglobenc.backends.dispatch import check_backend
from pyglobenc.common.autocast import callers_autocast
from pyglobenc.common.deferred import check_range, may_look, require
from pyglobenc.hf import LayerTrace, capture, find_layers
from pyglobenc.hf.labels import classifies
from pyglobenc.hf.limits import (
    check_readable,
    first_position,
    max_tokens,
    not_finite,
    padding_id,
    token_types,
    vocabulary,
    weights_named,
)
from pyglobenc.hf.registry import is_decoder
from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.methods.arguments import run_model
from pyglobenc.methods.head import HeadRecord, detached, find_logits, recorded_head, tokens_read
from pyglobenc.methods.precision.arithmetic import set_precision


def check_model(who: str, model: nn.Module, backend: str, dtype: torch.dtype | None) -> nn.Module:
    """Check a model, backend and dtype, and return the module that is called, see `called_module`.

    The function takes no tensors and runs nothing.

    Raises:
        TypeError, ValueError: The architecture, a parameter, the backend or the dtype isn't supported. The
            message begins with `who`.
    """
    check_backend(backend, who)
    check_dtype(who, dtype)
    model = called_module(model)
    find_layers(model)
    check_readable(model)
    return model


def check_dtype(who: str, dtype: Any) -> None:
    """Raise ValueError unless a dtype is None, float32 or float64; the message begins with `who`."""
    if not any(dtype is known for known in (None, torch.float32, torch.float64)):
        raise ValueError(f"{who}: dtype must be None, torch.float32 or torch.float64, got {dtype!r:.80}")


def run_captured(
    who: str, model: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype | None, targets: Any = ()
) -> tuple[list[LayerTrace], Any, Tensor | None]:
    """Check a batch and run the model on it.

    Args:
        who: name of the method for errors.
        model: the module that `called_module` returned.
        batch: its inputs, such as input_ids (B, n); see `check_batch`.
        dtype: dtype of the attribution arithmetic, as for `GlobEnc`.
        targets: None to find what the model's head reads. With other targets the head isn't examined.

    Returns:
        The captured layers, in the precision that was asked for; the output of the model; and what its head
        reads, (B, 1) or (B, 1, n) as `tokens_read` says. The last one is None if targets isn't None, or if
        the output doesn't hold one set of logits an example.

    Raises:
        TypeError, ValueError: as `check_batch`, `capture` and `tokens_read`.
    """
    check_batch(who, model, batch)
    stock = stock_model(model)
    if is_decoder(stock) and not may_look() and batch.get("attention_mask") is None:
        # Without a mask, transformers treats every input as packed sequences while a graph is recorded.
        ids = batch.get("input_ids", batch.get("inputs_embeds"))
        batch = {**batch, "attention_mask": torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)}
    gradients = torch.is_grad_enabled()
    with (
        weights_named(model),
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        ExitStack() as stack,
    ):
        batch = graph_inputs(batch)
        trace = stack.enter_context(capture(model))
        stack.enter_context(callers_autocast())
        record = None
        if targets is None:
            record = stack.enter_context(recorded_head(model, stock, trace, leaf=True))
        output = run_model(model, batch)
        trace.ran_on(batch)
        read = None
        if record is not None:
            read, output = (
                read_by_head(who, model, record, output, trace.layers[-1].key_mask),
                detached(output),
            )
    set_precision(trace.layers, dtype)
    return trace.layers, output, read


def graph_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose tensors, of any shapes, may be part of an autograd graph.

    A tensor that was made in inference mode can't be, so it is copied.
    """
    return {
        name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
        for name, value in batch.items()
    }


def read_by_head(
    who: str, model: nn.Module, record: HeadRecord, output: Any, key_mask: Tensor | None
) -> Tensor | None:
    """Return what the head reads, if it returns one set of logits for each example.

    Args:
        who, model, record, key_mask: as for `tokens_read`.
        output: the output of the model.

    Returns:
        (B, 1) or (B, 1, n) as `tokens_read` says, or None if the output doesn't hold such logits.
    """
    logits = find_logits(output)
    if logits is None or logits.dim() != 2 or record.top is None or len(logits) != len(record.top):
        return None
    return tokens_read(who, model, record, logits, key_mask)


def check_evaluation(who: str, model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a model, and refuse a model in training mode."""
    stock = stock_model(model)
    if model.training or stock.training:
        raise ValueError(
            f"{who}: the model is in training mode, where dropout changes the result; call model.eval() first"
        )
    return stock


def check_batch(who: str, model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Check the values that transformers would refuse with an obscure error, or accept silently.

    Args:
        who: name of the method for errors.
        model: the model that gets the batch.
        batch: its inputs. A text model takes input_ids (B, n) int64 or int32, or inputs_embeds (B, n, d),
            and attention_mask (B, n) of 0 and 1. An image encoder takes pixel_values
            (B, channels, height, width).

    Raises:
        TypeError, ValueError: The model is in training mode. There is no input, or its shape is wrong. An id,
            token type or position has no embedding. The text is empty or too long. An example has no real
            token. A classifier would read padding.
    """
    model = check_evaluation(who, model)
    if model.main_input_name == "pixel_values":
        _check_pixels(who, batch.get("pixel_values"))
        return
    name, shape = (
        ("inputs_embeds", "(B, n, d)") if batch.get("input_ids") is None else ("input_ids", "(B, n)")
    )
    ids = batch.get(name)
    if ids is None:
        raise ValueError(
            f"{who}: the batch has neither input_ids nor inputs_embeds, got {', '.join(batch) or 'nothing'}"
        )
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"{who}: {name} must be a tensor {shape}, got {type(ids).__name__}; ask the tokenizer for "
            f"return_tensors='pt'"
        )
    if ids.dim() != len(shape.split(",")) or 0 in ids.shape:
        raise ValueError(
            f"{who}: {name} must be {shape} with at least one example and one token, got {tuple(ids.shape)}"
        )
    if name == "input_ids":
        check_ids(who, model, ids)
    limit = max_tokens(model)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(
            f"{who}: the input has {ids.shape[1]} tokens and the model takes {limit}; "
            "truncate it (truncation=True) or split it into windows"
        )
    if batch.get("attention_mask") is not None:
        _check_mask(who, batch["attention_mask"], ids.shape[:2])
    for other, size in (
        ("token_type_ids", token_types(model)),
        ("position_ids", limit and limit + first_position(model)),
    ):
        if batch.get(other) is not None:
            _check_index(who, other, batch[other], ids.shape[:2], size)
    if is_decoder(model) and classifies(model):
        _check_last(who, model, batch)


def check_ids(who: str, model: PreTrainedModel, ids: Tensor) -> None:
    """Check that token ids, of any shape (B, n) or (N,), are integers that the model has embeddings for.

    Raises:
        TypeError, ValueError: they aren't. The message begins with `who`.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{who}: input_ids must be int64 or int32, got {ids.dtype}")
    check_range(who, "input_ids", ids, vocabulary(model))


def _check_index(who: str, name: str, index: Any, shape: Sequence[int], size: int | None) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{who}: {name} must be a tensor of int64 or int32, got "
            f"{getattr(index, 'dtype', type(index).__name__)}"
        )
    if tuple(index.shape) not in (tuple(shape), (1, shape[1])):
        raise ValueError(f"{who}: {name} must be (B, n) = {tuple(shape)}, got {tuple(index.shape)}")
    if size is not None:
        check_range(who, name, index, size)


def _check_last(who: str, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Refuse padding that the head of a decoder's classifier would read.

    The head reads the last token that isn't the model's padding id.
    """
    mask, ids, padding = batch.get("attention_mask"), batch.get("input_ids"), padding_id(model)
    if mask is None:
        return
    if ids is None or padding is None:
        read = mask[:, -1]
    else:
        last = torch.arange(ids.shape[1], device=ids.device).masked_fill(ids == padding, 0).argmax(1)
        read = mask.to(ids.device).gather(1, last[:, None])
    known = "its config has no pad_token_id" if padding is None else f"pads with the token {padding}"
    require(
        read.all(),
        lambda: ValueError(
            f"{who}: {type(model).__name__} {known}, so its head would read padding here; give one text at "
            f"a time"
        ),
    )


def _check_mask(who: str, mask: Any, shape: Sequence[int]) -> None:
    if not isinstance(mask, Tensor) or mask.shape != shape:
        came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{who}: attention_mask must be a tensor (B, n) = {tuple(shape)}, got {came}")
    real = mask == 1

    def error() -> ValueError:
        empty = bool((mask == 0).all(1).any())
        why = (
            "an example has no real token (its attention_mask is all 0)"
            if empty
            else "attention_mask must hold 0 and 1 alone"
        )
        return ValueError(f"{who}: {why}")

    # The two conditions are joined so that the device is waited for only once.
    require((real | (mask == 0)).all() & real.any(1).all(), error)


def _check_pixels(who: str, pixels: Any) -> None:
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or 0 in pixels.shape:
        came = (
            "nothing"
            if pixels is None
            else tuple(pixels.shape)
            if isinstance(pixels, Tensor)
            else type(pixels).__name__
        )
        raise ValueError(f"{who}: pixel_values must be a tensor (B, channels, height, width), got {came}")


def require_finite(who: str, model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Check that all entries of a result's tensors, of any shapes such as (B, T, n), are finite.

    Raises:
        ValueError: one isn't. The message begins with `who` and names the parameter at fault if there is one.
    """
    finite = [torch.isfinite(t).all() for t in tensors]
    # The layers of a model may be on several devices.
    require(torch.stack([one.to(finite[0].device) for one in finite]).all(), lambda: not_finite(who, model))

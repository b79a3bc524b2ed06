"""Attributes sequences of any lengths in one pass, packed end to end without padding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyglobenc.backends.shared.packing import padded, real_tokens, slices
from pyglobenc.common.autocast import callers_autocast
from pyglobenc.common.deferred import check_range
from pyglobenc.common.integers import integers
from pyglobenc.hf import LayerTrace, capture, find_layers
from pyglobenc.hf.labels import classifies
from pyglobenc.hf.limits import max_tokens, padding_id, token_types
from pyglobenc.hf.positions import own_positions
from pyglobenc.hf.registry import is_decoder
from pyglobenc.hf.unwrap import is_stock_model
from pyglobenc.methods.arguments import forward_replaced, output_settings
from pyglobenc.methods.head import HeadRecord, detached, find_logits, recorded_head
from pyglobenc.methods.inputs import check_evaluation, check_ids, read_by_head
from pyglobenc.methods.precision.arithmetic import set_precision
from pyglobenc.methods.rollout.rows import RolloutResult, rollout_result
from pyglobenc.methods.target_tokens import target_positions, unnamed_rows

# A rollout of captured layers for targets (S, T), positions among all N tokens. It returns scores
# (1, L, T, N) and log_scale (S, L, T).
Rows = Callable[[list[LayerTrace], Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Packed:
    """Inputs of S sequences packed end to end, shortest first, so that those of equal length are adjacent.

    Attributes:
        inputs: inputs of the model without its head, each (1, N).
        cu_seqlens: (S + 1,) int32 on the CPU. Packed sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
        order: order[s] is the index of packed sequence s among the sequences as they were given.
    """

    inputs: dict[str, Tensor]
    cu_seqlens: Tensor
    order: list[int]

    def twice(self) -> "Packed":
        """Return all sequences, followed by all of them again."""
        inputs = {name: torch.cat([column, column], 1) for name, column in self.inputs.items()}
        return Packed(
            inputs, torch.cat([self.cu_seqlens, self.cu_seqlens[1:] + self.cu_seqlens[-1]]), self.order * 2
        )

    def cut(self, of: Callable[[slice, slice], Any]) -> list[Any]:
        """Call `of` for each sequence and return the results in the order in which the sequences were given.

        `of` gets two slices: the place of the sequence among the S packed ones, and its tokens among all N.
        """
        out: list[Any] = [None] * len(self.order)
        for s, (index, tokens) in enumerate(zip(self.order, slices(self.cu_seqlens), strict=True)):
            out[index] = of(slice(s, s + 1), tokens)
        return out


def attribute_packed(
    who: str,
    model: nn.Module,
    batch: Mapping[str, Any],
    targets: Any,
    dtype: torch.dtype | None,
    layers: bool,
    rows: Rows,
) -> list[RolloutResult]:
    """Run a model on packed sequences, roll out, and return one result for each sequence.

    Args:
        who: name of the method for errors.
        model, batch: as for `pack`.
        targets: T positions for every sequence, (S, T), "mean" or None, as `GlobEnc.packed` takes them.
        dtype: dtype of the attribution arithmetic, as for `GlobEnc`.
        layers: whether the results hold the rollout up to every layer.
        rows: the rollout, which takes captured layers and targets.

    Returns:
        S results of batch size 1 with scores (1, T, n_s), in the order in which the sequences were given.

    Raises:
        TypeError, ValueError: as `pack`, or a target is out of range, or a score isn't finite.
    """
    packed = pack(who, model, batch)
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        trace = stack.enter_context(capture(model, cu_seqlens=packed.cu_seqlens))
        stack.enter_context(callers_autocast())
        record = read = None
        if targets is None:
            record = stack.enter_context(recorded_head(model, model, trace, leaf=True))
        output = run_packed(model, packed, record)
        if record is not None:
            read, output = (
                read_by_head(who, model, record, output, real_tokens(packed.cu_seqlens)),
                detached(output),
            )
    captured = trace.layers
    set_precision(captured, dtype)
    positions = _positions(who, targets, packed, captured[-1], read)
    whole = rollout_result(who, model, *rows(captured, positions), layers, captured)
    logits, starts = find_logits(output), packed.cu_seqlens[:-1, None].to(positions.device)
    of_sequences = logits is not None and logits.dim() == 2 and len(logits) == len(packed.order)
    explained = None if positions.is_floating_point() else positions - starts

    def one(own: slice, tokens: slice) -> RolloutResult:
        of_layers = (whole.layer_scores[..., tokens], whole.layer_log_scale[own]) if layers else ()
        returned = of_examples(output, own, len(packed.order)) if of_sequences else None
        position, error = (None if t is None else t[own] for t in (explained, whole.error))
        named = dict(output=returned, targets=position, error=error)
        return RolloutResult(whole.scores[..., tokens], whole.log_scale[own], *of_layers, **named)

    return packed.cut(one)


def run_packed(model: PreTrainedModel, packed: Packed, record: HeadRecord | None) -> Any:
    """Run a model within `capture` on packed sequences, and its own head on their padded states.

    Args:
        model: a transformers model.
        packed: S sequences with inputs (1, N).
        record: record of the head, which is told where the head starts, or None.

    Returns:
        What the head returns for S sequences. None for a base model or a language model, whose head isn't
        run, because it has no logits for a whole sequence.
    """
    base = model.base_model
    options = output_settings(base) | {"output_hidden_states": False}
    if base is model or model.get_output_embeddings() is not None:
        base(**packed.inputs, **options)
        return None
    ids = padded(packed.inputs["input_ids"], packed.cu_seqlens, padding_id(model) or 0)
    mask = real_tokens(packed.cu_seqlens).long().to(ids.device)
    with _padded_states(base, packed, options, record):
        return model(input_ids=ids, attention_mask=mask, **output_settings(model))


@contextmanager
def _padded_states(
    base: nn.Module, packed: Packed, options: dict[str, Any], record: HeadRecord | None
) -> Iterator[None]:
    """Context in which a base model runs on packed sequences, whatever inputs it is given.

    It returns the states of each sequence, padded to (S, n, d).
    """
    forward, thread = base.forward, get_ident()

    def run(*args: Any, **kwargs: Any) -> Any:
        if get_ident() != thread:
            return forward(*args, **kwargs)
        wanted = {name: kwargs[name] for name in options if name in kwargs}
        out = forward(**packed.inputs, **options | wanted)
        states = padded(out.last_hidden_state, packed.cu_seqlens)
        out.last_hidden_state = states = states if record is None else record.start(states)
        if getattr(base, "pooler", None) is not None:
            # ALBERT has a Linear as pooler and its activation beside it.
            alone = isinstance(base.pooler, nn.Linear)
            out.pooler_output = (
                base.pooler_activation(base.pooler(states[:, 0])) if alone else base.pooler(states)
            )
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(padded(t, packed.cu_seqlens) for t in out.hidden_states)
        return out

    with forward_replaced(base, run):
        yield


def of_examples(output: Any, own: slice, size: int) -> Any:
    """Return the part of a model's output that belongs to some of `size` examples.

    Args:
        output: a tensor, a mapping or a tuple, with logits (B, C) for example. Tensors whose first axis has
            another length than size, and values of other types, are returned whole.
        own: which examples. A tensor (B, C) becomes output[own].
        size: B.

    Returns:
        The same containers, with tensors such as (1, C).
    """
    if isinstance(output, Tensor):
        return output[own] if output.dim() and len(output) == size else output
    if isinstance(output, Mapping):
        return type(output)(**{name: of_examples(value, own, size) for name, value in output.items()})
    return tuple(of_examples(value, own, size) for value in output) if isinstance(output, tuple) else output


def check_packable(who: str, model: nn.Module) -> None:
    """Check, without tensors, that a model can keep packed sequences apart.

    Raises:
        ValueError: it can't. The message begins with `who` and gives the reason.
    """
    if not is_stock_model(model):
        raise ValueError(
            f"{who}: packed sequences need a transformers model; {type(model).__name__} has a head of its "
            f"own around one"
        )
    base = model.base_model
    if any(layer.own_scores is not None for layer in find_layers(model)):
        raise ValueError(
            f"{who}: {type(model).__name__} computes attention itself and can't keep packed sequences apart"
        )
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{who}: {type(model).__name__} takes {model.main_input_name}, which can't be packed"
        )
    if "position_ids" not in signature(base.forward).parameters:
        raise ValueError(
            f"{who}: {type(base).__name__} takes no position_ids: packed sequences would be one long text "
            f"to it"
        )
    if classifies(model) and is_decoder(model) and padding_id(model) is None:
        name = type(model).__name__
        raise ValueError(
            f"{who}: the config of {name} has no pad_token_id, without which its head takes one text at a "
            f"time"
        )


def pack(who: str, model: nn.Module, batch: Mapping[str, Any]) -> Packed:
    """Pack sequences end to end and compute their positions.

    Args:
        who: name of the method for errors.
        model: the model that gets the sequences.
        batch: a list of S lists or tensors (n_s,) for each input. attention_mask must be ones, or absent.

    Returns:
        Packed, with inputs (1, N) on the device of the model.

    Raises:
        TypeError, ValueError: The model can't keep sequences apart, or is in training mode. There is nothing
            to pack, or there is padding. The inputs of a sequence differ in length. A sequence is too long
            for the model.
    """
    check_packable(who, model)
    check_evaluation(who, model)
    ids = batch.get("input_ids")
    if not isinstance(ids, Sequence) or not ids or not all(_is_row(row) for row in ids):
        raise TypeError(
            f"{who}: input_ids must be a list of lists of token ids; don't ask the tokenizer for padding or "
            f"tensors"
        )
    lengths, limit = [len(row) for row in ids], max_tokens(model)
    if limit is not None and max(lengths) > limit:
        raise ValueError(
            f"{who}: a sequence has {max(lengths)} tokens and the model takes {limit}; truncate it or split "
            f"it into windows"
        )
    order = sorted(range(len(ids)), key=lengths.__getitem__)
    columns = {}
    for name, rows in batch.items():
        rows = rows if isinstance(rows, Sequence) else ()
        if not all(_is_row(row) for row in rows) or [len(row) for row in rows] != lengths:
            raise ValueError(
                f"{who}: {name} must be as long as input_ids for every sequence, in a list of lists"
            )
        columns[name] = torch.cat([torch.as_tensor(rows[s], device="cpu") for s in order])
    check_ids(who, model, columns["input_ids"])
    if "token_type_ids" in columns:
        columns = _check_types(who, model, columns)
    if "attention_mask" in columns and not columns["attention_mask"].all():
        raise ValueError(f"{who}: attention_mask has zeros; packed sequences have no padding")
    sequences = columns["input_ids"].split([lengths[s] for s in order])
    columns["position_ids"] = torch.cat(own_positions(who, model, sequences))
    # Without a mask, some architectures look for packed sequences themselves.
    columns["attention_mask"] = torch.ones_like(columns["input_ids"])
    cu_seqlens = torch.tensor([0] + [lengths[s] for s in order], device="cpu").cumsum(0).to(torch.int32)
    return Packed(
        {name: column[None].to(model.device) for name, column in columns.items()}, cu_seqlens, order
    )


def in_order(who: str, name: str, index: Any, order: list[int]) -> Any:
    """Return the classes (S,) in the order in which the sequences are packed; one class stays as it is.

    Raises:
        TypeError: the classes aren't integers. The message names who and name.
    """
    if index is None or isinstance(index, str):
        return index
    index = integers(who, name, index)
    return index[order] if index.shape == (len(order),) else index


def _check_types(who: str, model: PreTrainedModel, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns, without token types if the model doesn't take them and they are all 0."""
    if "token_type_ids" in signature(model.base_model.forward).parameters:
        size = token_types(model)
        if size is not None:
            check_range(who, "token_type_ids", columns["token_type_ids"], size)
        return columns
    if columns["token_type_ids"].any():
        raise TypeError(f"{who}: takes no token_type_ids: {type(model).__name__} has no token types")
    return {name: column for name, column in columns.items() if name != "token_type_ids"}


def _is_row(row: Any) -> bool:
    """Tell whether this is a list or tensor of integers, at least one."""
    try:
        return isinstance(row, Tensor | Sequence) and integers("", "", row).dim() == 1 and len(row) > 0
    except TypeError:
        return False


def _positions(who: str, targets: Any, packed: Packed, layer: LayerTrace, read: Tensor | None) -> Tensor:
    """Return the positions (S, T) of targets among all N tokens, or the tokens' shares in a mean, (1, 1, N).

    Targets are T positions for every sequence, or (S, T).
    """
    if targets is None or isinstance(targets, str):
        return unnamed_rows(who, targets, layer, read)
    starts, lengths = packed.cu_seqlens[:-1, None].long(), packed.cu_seqlens.diff()[:, None].long()
    rows = target_positions(who, targets, len(packed.order), "cpu")[packed.order]
    if bool(((rows < 0) | (rows >= lengths)).any()):
        raise ValueError(
            f"{who}: targets must lie in [0, n) for a sequence of n tokens; the shortest has "
            f"{int(lengths.min())}"
        )
    return starts + rows

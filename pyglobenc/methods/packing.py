"""Sequences of any lengths through the model and the rollout as one, packed end to end without padding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyglobenc.autocast import callers_autocast
from pyglobenc.hf import LayerTrace, capture, find_layers
from pyglobenc.hf.labels import classifies
from pyglobenc.hf.limits import max_tokens, padding_id, token_types
from pyglobenc.hf.positions import own_positions
from pyglobenc.hf.registry import is_decoder
from pyglobenc.methods.arguments import output_settings
from pyglobenc.methods.inputs import check_ids, target_positions
from pyglobenc.methods.precision import set_precision
from pyglobenc.methods.rollout import RolloutResult, rollout_result
from pyglobenc.reference.packing import per_sequence, slices
from pyglobenc.values import check_range

# scores (1, L, T, N) and log_scale (S, L, T) of captured layers and targets (S, T), positions among all N tokens
Rows = Callable[[list[LayerTrace], Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Packed:
    """Inputs of S sequences end to end, shortest first, so that those of one length lie side by side.

    Attributes:
        inputs: of the model without its head, each (1, N).
        offsets: (S + 1,) int32, on the CPU: sequence order[s] is tokens offsets[s] to offsets[s + 1].
        order: numbers of the sequences as they were given.
        read: (S,) int64, on the CPU: the token of each, among all N, that a classifier's head reads.
    """

    inputs: dict[str, Tensor]
    offsets: Tensor
    order: list[int]
    read: Tensor

    def twice(self) -> "Packed":
        """All sequences, and after them all of them again."""
        inputs = {name: torch.cat([column, column], 1) for name, column in self.inputs.items()}
        offsets, read = (torch.cat([t, own + self.offsets[-1]]) for t, own in ((self.offsets, self.offsets[1:]), (self.read, self.read)))
        return Packed(inputs, offsets, self.order * 2, read)

    def cut(self, of: Callable[[slice, slice], Any]) -> list[Any]:
        """What `of` makes of each sequence, in the order in which they were given, from its place among the S and its tokens."""
        out: list[Any] = [None] * len(self.order)
        for s, (index, tokens) in enumerate(zip(self.order, slices(self.offsets), strict=True)):
            out[index] = of(slice(s, s + 1), tokens)
        return out


def attribute_packed(
    who: str, model: PreTrainedModel, batch: Mapping[str, Any], targets: Any, dtype: torch.dtype | None, layers: bool, rows: Rows
) -> list[RolloutResult]:
    """Run a model on packed sequences, roll out with `rows`, and cut the result into one for each sequence."""
    packed = pack(who, model, batch)
    with capture(model if classifies(model) else model.base_model, offsets=packed.offsets) as trace, callers_autocast():
        output = run_packed(model, packed)
    captured = trace.layers
    set_precision(captured, dtype)
    positions = _positions(who, targets, packed, causal=captured[-1].window[1] == 0)
    whole = rollout_result(who, model, *rows(captured, positions), layers)

    def one(own: slice, tokens: slice) -> RolloutResult:
        of_layers = (whole.layer_scores[..., tokens], whole.layer_log_scale[own]) if layers else ()
        returned = of_examples(output, own, len(packed.order))
        return RolloutResult(whole.scores[..., tokens], whole.log_scale[own], *of_layers, output=returned)

    return packed.cut(one)


def run_packed(model: PreTrainedModel, packed: Packed) -> Any:
    """Run a model within `capture` on packed sequences: what a classifier returns for the S of them, else None, and no head is run."""
    base = model.base_model
    options = output_settings(base) | {"output_hidden_states": False}
    if not classifies(model):
        base(**packed.inputs, **options)
        return None
    ids = packed.inputs["input_ids"][0, packed.read.to(model.device)][:, None]
    with _read_tokens(base, packed, options):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **output_settings(model))


@contextmanager
def _read_tokens(base: nn.Module, packed: Packed, options: dict[str, Any]) -> Iterator[None]:
    """Context in which a model without its head runs on packed sequences, whatever it is given, and returns the token of each that a head
    reads, (S, 1, d): sequences of one token to the head."""
    own, forward, thread = vars(base).get("forward"), base.forward, get_ident()

    def read(*args: Any, **kwargs: Any) -> Any:
        if get_ident() != thread:
            return forward(*args, **kwargs)
        out = forward(**packed.inputs, **options)
        states = out.last_hidden_state
        states = out.last_hidden_state = states[0, packed.read.to(states.device)][:, None]
        if getattr(base, "pooler", None) is not None:
            # ALBERT's is a Linear beside its activation
            alone = isinstance(base.pooler, nn.Linear)
            out.pooler_output = base.pooler_activation(base.pooler(states[:, 0])) if alone else base.pooler(states)
        return out

    vars(base)["forward"] = read
    try:
        yield
    finally:
        if own is None:
            del vars(base)["forward"]
        else:
            vars(base)["forward"] = own


def of_examples(output: Any, own: slice, size: int) -> Any:
    """What a model returned for some of `size` examples."""
    if isinstance(output, Tensor):
        return output[own] if output.dim() and len(output) == size else output
    if isinstance(output, Mapping):
        return type(output)(**{name: of_examples(value, own, size) for name, value in output.items()})
    return tuple(of_examples(value, own, size) for value in output) if isinstance(output, tuple) else output


def check_packable(who: str, model: PreTrainedModel) -> None:
    """Raise ValueError, naming who, if a model can't keep packed sequences apart."""
    base = model.base_model
    if any(layer.own_scores is not None for layer in find_layers(model)):
        raise ValueError(f"{who}: {type(model).__name__} computes attention itself and can't keep packed sequences apart")
    if model.main_input_name != "input_ids":
        raise ValueError(f"{who}: {type(model).__name__} takes {model.main_input_name}, which can't be packed")
    if "position_ids" not in signature(base.forward).parameters:
        raise ValueError(f"{who}: {type(base).__name__} takes no position_ids: packed sequences would be one long text to it")
    if classifies(model) and is_decoder(model) and padding_id(model) is None:
        name = type(model).__name__
        raise ValueError(f"{who}: the config of {name} has no pad_token_id, without which its head takes one text at a time")
    if classifies(model) and getattr(model.config, "classifier_pooling", "cls") != "cls":
        raise ValueError(f"{who}: the head of {type(model).__name__} reads the mean of a sequence's tokens, and of packed ones gets one")


def pack(who: str, model: PreTrainedModel, batch: Mapping[str, Any]) -> Packed:
    """Sequences end to end with their positions.

    Args:
        who: method named in errors.
        model: that gets them.
        batch: of each input a list of S lists or tensors (n_s,); attention_mask of ones, or left out.

    Raises:
        TypeError, ValueError: a model that can't keep them apart, training mode, nothing to pack, padding, inputs of different lengths, a
            sequence too long for the model.
    """
    check_packable(who, model)
    if model.training:
        raise ValueError(f"{who}: the model is in training mode, where dropout changes the result; call model.eval() first")
    ids = batch.get("input_ids")
    if not isinstance(ids, Sequence) or not ids or not all(_is_row(row) for row in ids):
        raise TypeError(f"{who}: input_ids must be a list of lists of token ids; don't ask the tokenizer for padding or tensors")
    lengths, limit = [len(row) for row in ids], max_tokens(model)
    if limit is not None and max(lengths) > limit:
        raise ValueError(f"{who}: a sequence has {max(lengths)} tokens and the model takes {limit}; truncate it or split it into windows")
    order = sorted(range(len(ids)), key=lengths.__getitem__)
    columns = {}
    for name, rows in batch.items():
        if [len(row) for row in rows] != lengths:
            raise ValueError(f"{who}: {name} must be as long as input_ids for every sequence")
        columns[name] = torch.cat([torch.as_tensor(rows[s], device="cpu") for s in order])
    check_ids(who, model, columns["input_ids"])
    if "token_type_ids" in columns:
        columns = _check_types(who, model, columns)
    if "attention_mask" in columns and not columns["attention_mask"].all():
        raise ValueError(f"{who}: attention_mask has zeros; packed sequences have no padding")
    sequences = columns["input_ids"].split([lengths[s] for s in order])
    columns["position_ids"] = torch.cat(own_positions(who, model, sequences))
    # without a mask some architectures look for packed sequences themselves
    columns["attention_mask"] = torch.ones_like(columns["input_ids"])
    offsets = torch.tensor([0] + [lengths[s] for s in order], device="cpu").cumsum(0).to(torch.int32)
    read = _tokens_read(model, columns["input_ids"], offsets)
    return Packed({name: column[None].to(model.device) for name, column in columns.items()}, offsets, order, read)


def _check_types(who: str, model: PreTrainedModel, columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns without token types that the model doesn't take, all 0."""
    if "token_type_ids" in signature(model.base_model.forward).parameters:
        size = token_types(model)
        if size is not None:
            check_range(who, "token_type_ids", columns["token_type_ids"], size)
        return columns
    if columns["token_type_ids"].any():
        raise TypeError(f"{who}: takes no token_type_ids: {type(model).__name__} has no token types")
    return {name: column for name, column in columns.items() if name != "token_type_ids"}


def _tokens_read(model: PreTrainedModel, ids: Tensor, offsets: Tensor) -> Tensor:
    """Token of each sequence that a classifier's head reads: the first, of a decoder the last that isn't its padding token's."""
    first = offsets[:-1].long()
    if not is_decoder(model):
        return first
    padding = padding_id(model)
    last = torch.arange(len(ids), device="cpu")
    if padding is not None:
        # a sequence of nothing else is read at its first
        last = last.masked_fill(ids == padding, 0)
    return torch.maximum(per_sequence(last[None, None], offsets)[:, 0], first)


def _is_row(row: Any) -> bool:
    return isinstance(row, Tensor | Sequence) and torch.as_tensor(row, device="cpu").dim() == 1 and len(row) > 0


def _positions(who: str, targets: Any, packed: Packed, causal: bool) -> Tensor:
    """Positions (S, T) among all tokens of targets, T for every sequence or (S, T); None: the first, or last of a causal model."""
    starts, lengths = packed.offsets[:-1, None].long(), packed.offsets.diff()[:, None].long()
    if targets is None:
        return starts + (lengths - 1 if causal else 0)
    rows = target_positions(who, torch.as_tensor(targets, device="cpu"), len(packed.order))[packed.order]
    if bool(((rows < 0) | (rows >= lengths)).any()):
        raise ValueError(f"{who}: targets must lie in [0, n), n the tokens of their sequence, the shortest {int(lengths.min())}")
    return starts + rows

"""Finds the logit that a method explains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyglobenc.common.deferred import check_range, require
from pyglobenc.common.integers import integers
from pyglobenc.methods.head import find_logits

SPANS = ("start", "end")

Index = int | Sequence[int] | Tensor | None


@dataclass
class Target:
    """The explained logit, or difference of two logits, of each example, or several logits of each.

    Attributes:
        index: (B,) or (B, T) int64, the class explained. For question answering, 0 is the start and 1 the
            end.
        contrast: (B,) or (B, T) int64, the class whose logit is subtracted, or None.
        logit: (B,) or (B, T), the explained value, in the autograd graph.
        position: (B,) or (B, T) int64, the token whose logit is explained; None if an example has one set of
            logits.
    """

    index: Tensor
    contrast: Tensor | None
    logit: Tensor
    position: Tensor | None = None


def find_target(
    who: str,
    output: Any,
    target: Any,
    contrast: Index,
    position: Index,
    key_mask: Tensor | None,
    kept: Tensor | None = None,
    several: bool = False,
) -> Target:
    """Find the explained logit in the model's output; see `TransformerAttribution.__call__`.

    Without a target, the class with the largest logit is explained.

    Args:
        who: name of the method for errors.
        output: the output of the model, with logits (B, C) or (B, n, C), or start_logits and end_logits
            (B, n).
        target, contrast, position: arguments of the user's call.
        key_mask: (B, n) bool, True for real tokens, or None if all tokens are real.
        kept: the positions of the tokens whose logits the model returned, as logits_to_keep gives them; None
            for all tokens.
        several: whether position may be (B, T), and target and contrast too, for T logits of each example.

    Returns:
        The explained logit of each example, (B,) or (B, T), with its class.

    Raises:
        TypeError, ValueError: the output has no logits, or the arguments name none of them.
    """
    if isinstance(output, Mapping) and all(f"{name}_logits" in output for name in SPANS):
        return _span(who, output, target, contrast, position, key_mask)
    logits = find_logits(output)
    if logits is None:
        raise ValueError(
            f"{who}: the model has no head to explain; it must return logits (B, C) or (B, "
            "n, C), alone or as 'logits', "
            "or start_logits and end_logits"
        )
    batch, device = logits.shape[0], logits.device
    at = None
    if logits.dim() == 3:
        if position is None:
            raise ValueError(
                f"{who}: this model has logits for every token; name the token: position=i, "
                "or one for each example"
            )
        size = logits.shape[1] if kept is None else int(kept.max()) + 1
        at = _indices(who, "position", position, (batch,), size, device, several)
        _check_real(who, at, key_mask)
        logits = _logits_at(who, logits, at, kept)
    elif position is not None:
        raise ValueError(
            f"{who}: position names a token's logit; this model has one set of logits for an example"
        )
    if isinstance(target, str):
        raise TypeError(f"{who}: target must be a class index, got {target!r}")
    index = (
        logits.argmax(-1)
        if target is None
        else _indices(who, "target", target, logits.shape[:-1], logits.shape[-1], device)
    )
    logit = logits.gather(-1, index[..., None])[..., 0]
    if contrast is None:
        return Target(index, None, logit, at)
    other = _indices(who, "contrast", contrast, logits.shape[:-1], logits.shape[-1], device)
    require(
        (other != index).all(),
        lambda: ValueError(f"{who}: contrast must be another class than target"),
    )
    return Target(index, other, logit - logits.gather(-1, other[..., None])[..., 0], at)


def _logits_at(who: str, logits: Tensor, at: Tensor, kept: Tensor | None) -> Tensor:
    """Return the logits (B, C) or (B, T, C) at positions (B,) or (B, T), given logits (B, n or kept, C)."""
    rows = at[:, None] if at.dim() == 1 else at
    if kept is not None:
        same = rows[..., None] == kept.to(rows.device)
        require(
            same.any(-1).all(),
            lambda: ValueError(f"{who}: position must be one of the tokens that logits_to_keep names"),
        )
        rows = same.int().argmax(-1)
    logits = logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[2]))
    return logits[:, 0] if at.dim() == 1 else logits


def kept_positions(batch: Mapping[str, Any], n: int) -> Tensor | None:
    """Return the positions whose logits a batch's logits_to_keep asks for; None for all n tokens."""
    kept = batch.get("logits_to_keep")
    if isinstance(kept, Tensor) and kept.dim():
        return kept
    return torch.arange(n)[-int(kept) :] if kept else None


def next_token_position(who: str, logits: Tensor, n: int, key_mask: Tensor | None) -> Tensor:
    """Return the positions (B,) int64 whose logits are those of the token after each text.

    Args:
        who: name of the method for errors.
        logits: (B, n, C), of a causal language model.
        n: number of tokens.
        key_mask: (B, n) bool, True for real tokens, or None if all tokens are real.

    Raises:
        ValueError: the model returned the logits of some tokens alone.
    """
    if logits.shape[1] != n:
        raise ValueError(
            f"{who}: the logits of the last token are explained, and the model returned those "
            f"of {logits.shape[1]} of {n} tokens; leave logits_to_keep out"
        )
    if key_mask is None:
        return torch.full((len(logits),), n - 1, device=logits.device)
    return torch.arange(n, device=key_mask.device).masked_fill(~key_mask, -1).amax(1)


def _span(
    who: str, output: Any, target: Any, contrast: Index, position: Index, key_mask: Tensor | None
) -> Target:
    """Return the start logit (by default) or the end logit of a question answering model.

    Without a position, it is the largest one of the real tokens.
    """
    which = SPANS[0] if target is None else target
    if which not in SPANS:
        raise ValueError(f"{who}: target must be 'start' or 'end' for question answering, got {target!r}")
    if contrast is not None:
        raise ValueError(f"{who}: contrast needs classes; question answering has none")
    logits = output.start_logits if which == "start" else output.end_logits
    if position is None:
        real = logits if key_mask is None else logits.masked_fill(~key_mask.to(logits.device), float("-inf"))
        at = real.argmax(-1)
    else:
        at = _indices(who, "position", position, logits.shape[:1], logits.shape[1], logits.device)
    _check_real(who, at, key_mask)
    return Target(torch.full_like(at, SPANS.index(which)), None, logits.gather(1, at[:, None])[:, 0], at)


def _indices(
    who: str,
    name: str,
    value: Any,
    shape: Sequence[int],
    size: int,
    device: torch.device,
    several: bool = False,
) -> Tensor:
    """Return value as an int64 tensor of a shape, (B,) or (B, T), and check that it lies in [0, size).

    One integer, or one for each example, stands for all T. With `several`, a value (B, T) may replace (B,).
    """
    index = integers(who, name, value, device)
    if index.is_inference():
        # A tensor that was made in inference mode can't be part of an autograd graph.
        index = index.clone()
    if several and index.dim() == 2 and len(index) == shape[0] and index.shape[1]:
        shape = index.shape
    if index.dim() == 0:
        index = index.expand(shape)
    if index.dim() == 1 and len(shape) == 2 and len(index) == shape[0]:
        index = index[:, None].expand(shape)
    if index.shape != torch.Size(shape):
        raise ValueError(
            f"{who}: {name} must be one integer or one for each of {shape[0]} examples, got shape "
            f"{tuple(index.shape)}"
        )
    check_range(who, name, index, size)
    return index.long()


def _check_real(who: str, at: Tensor, key_mask: Tensor | None) -> None:
    if key_mask is not None:
        real = key_mask.gather(1, at.view(len(at), -1).to(key_mask.device)).all()
        require(real, lambda: ValueError(f"{who}: position is a padding token"))

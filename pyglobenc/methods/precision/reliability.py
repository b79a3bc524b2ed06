"""Measures or estimates how far rounding moves the scores of an attribution.

Relevance is divided by sums of terms of both signs: a residual sum, the attention output, a score. Where
such a sum is small compared with its terms, the division amplifies its rounding error, which includes the
error of the forward pass so far. The result is the relative L2 error of the scores. The entry of the pooled
token is left out, because the published code overwrites it. There are two ways to find the error:

measured: the attribution runs a second time, and the scores are compared. In the second run every layer's
input, and what its Linear modules and norms return, are moved by about one rounding unit of the forward pass.
Both runs are one batch. For a short input, where Python takes most of the time, this costs little more. For a
long one it costs twice as much.

estimated: an observer of the relevance pass adds up expected errors, see `relevance_error`.

NaN means that the error is unknown: nothing moved, or there is no relevance that could move.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.launch import HALF
from pyglobenc.backends.shared.packing import position_of, sequence_sums
from pyglobenc.common.deferred import may_look
from pyglobenc.hf.trace.layers import LayerModules
from pyglobenc.hf.trace.threads import in_this_thread

MODES = ("auto", "measured", "estimated", "off")

# "auto" measures an input if its forward pass takes fewer multiply-adds than this. On two CPU cores the
# second run then adds at most half of the attribution's time. On a GPU the limit is where kernels begin to
# take longer than the host needs to launch the next ones.
MEASURED_BELOW = {"cpu": 1 << 29, "cuda": 1 << 36}

# A warning is given if the relative error is larger than this.
DIGITS_GONE = 1e-2

TINY = 1e-300

# Folders of the code between a user's line and a warning: this package's, and torch's for its decorators.
INSIDE = (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent))

# A warning names this many examples at most.
NAMED = 5
_NAMES: ContextVar[Sequence[str] | None] = ContextVar("pyglobenc_names_of_examples", default=None)


def measured(work: int, device: torch.device) -> bool:
    """Tell whether "auto" measures an input whose forward pass takes `work` multiply-adds.

    Args:
        work: number of multiply-adds.
        device: device of the input. Tensors on torch's meta device count as tensors on a CPU.
    """
    return work < MEASURED_BELOW.get(device.type, MEASURED_BELOW["cpu"])


class PrecisionWarning(UserWarning):
    """Rounding moves the scores by much, or by an unknown amount."""


class NoRelevanceWarning(UserWarning):
    """No token gets any relevance: the scores are 0 and say nothing about the tokens."""


@contextmanager
def examples_named(names: Sequence[str]) -> Iterator[None]:
    """Context in which warnings call the examples of a batch by these B names instead of their numbers."""
    token = _NAMES.set(names)
    try:
        yield
    finally:
        _NAMES.reset(token)


@contextmanager
def examples_reordered(order: Sequence[int]) -> Iterator[None]:
    """Context in which the examples of a batch are in another order, as packed sequences are."""
    names = _NAMES.get()
    with examples_named([f"example {i}" if names is None else names[i] for i in order]):
        yield


def named(which: Tensor) -> str:
    """Return the names of the examples for which a (B,) bool tensor is True."""
    rows, names = which.nonzero()[:, 0].tolist(), _NAMES.get()
    called = list(dict.fromkeys(f"example {row}" if names is None else names[row] for row in rows))
    more = f" and {len(called) - NAMED} more" if len(called) > NAMED else ""
    return ", ".join(called[:NAMED]) + more


def squared_norm(t: Tensor) -> Tensor:
    """Return the sum of squares of every example of t (B, ...), (B,) float64."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1).double().square()


def nudge(x: Tensor, cu_seqlens: Tensor | None = None, place: int = 0) -> Tensor:
    """Return x with every entry moved by about one rounding unit of the forward pass.

    The unit is that of the dtype of x, or of the dtype that autocast computes in. How an entry moves depends
    only on `place`, its position in the sequence and its feature. So an example or a packed sequence moves
    among others as it does alone.

    Args:
        x: (B, n, d), or (1, N, d) with packed sequences.
        cu_seqlens: boundaries (S + 1,) of packed sequences, or None.
        place: number of the tensor in the model, which selects a pattern.

    Returns:
        A tensor of the shape and dtype of x.
    """
    kind = x.device.type
    dtype = (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        else x.dtype
    )
    token = (
        torch.arange(x.shape[1], device=x.device) if cu_seqlens is None else position_of(cu_seqlens, x.device)
    )
    token = token.double()[:, None] * 977 + 7919 * place
    feature = torch.arange(1, x.shape[2] + 1, device=x.device, dtype=torch.float64)
    # The sines of integers, token + feature, have zero mean and no period.
    pattern = token.sin() * feature.cos() + token.cos() * feature.sin()
    # Sums of half precision are kept in float32, so only what is stored is rounded. Other sums round more.
    unit, most = torch.finfo(dtype), 1 if dtype in HALF else 2**0.5
    wide = x if x.dtype == torch.float64 else x.float()
    # Below the smallest normal number the rounding unit is an absolute one.
    step = wide.abs().clamp_(min=unit.tiny).mul_((pattern * most * unit.eps).to(wide.dtype))
    return step.add_(wide).to(x.dtype)


@contextmanager
def nudged(found: Sequence[LayerModules]) -> Iterator[None]:
    """Context in which a model runs with its hidden states moved by one rounding unit.

    Every layer's input and the outputs of its Linear modules, each (B, n, features), are moved as by `nudge`.
    A bias that is large beside the rest of a query, key or value hides the nudge of the layer's input. The
    hooks are removed on exit.

    Args:
        found: the layers of the model, as `find_layers` returns them.
    """
    places = {
        id(m): place for place, m in enumerate(t for layer in found for t in (layer.block, *layer.rounded()))
    }

    def change(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        place = places[id(module)]
        if args:
            return (nudge(args[0], place=place), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": nudge(kwargs["hidden_states"], place=place)}

    def change_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return nudge(output, place=places[id(module)])

    with ExitStack() as stack:
        for block in {layer.block for layer in found}:
            stack.callback(
                block.register_forward_pre_hook(in_this_thread(change), prepend=True, with_kwargs=True).remove
            )
        for module in {t for layer in found for t in layer.rounded()}:
            stack.callback(module.register_forward_hook(in_this_thread(change_output), prepend=True).remove)
        yield


def distance(moved: Tensor, scores: Tensor, own: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the relative L2 distance of two results, without the entries of the pooled tokens.

    Args:
        moved, scores: results (B, ...), or (1, N) of packed sequences. The distance is relative to scores.
        own: indices of the pooled tokens, (B, 1) or (1, S), whose entries are left out. None leaves out none.
        cu_seqlens: boundaries (S + 1,) of packed sequences, or None.

    Returns:
        Distances (B,) float64, or (S,) for packed sequences.
    """
    difference, size = moved - scores, scores
    if own is not None:
        difference, size = (t.scatter(1, own, 0) for t in (difference, size))
    if cu_seqlens is not None:
        difference, size = (sequence_sums(t.double().square(), cu_seqlens) for t in (difference, size))
    else:
        difference, size = squared_norm(difference), squared_norm(size)
    return (difference / size.clamp_min(TINY)).sqrt()


def known(error: Tensor, nothing: Tensor) -> Tensor:
    """Return an error (B,) with NaN where it is unknown.

    Args:
        error: (B,). An error of exactly 0 is unknown, since rounding always moves something.
        nothing: (B,) bool, True for examples without relevance, whose error is unknown too.
    """
    return error.masked_fill((error == 0) | nothing.to(error.device), float("nan"))


def warn_of_precision(who: str, error: Tensor, nothing: Tensor | None, how: str, advice: str) -> None:
    """Give a PrecisionWarning that names the examples whose error is large or unknown.

    Args:
        who: name of the method for the message.
        error: (B,) relative error, NaN where it is unknown.
        nothing: (B,) bool, True for examples without relevance, which don't count. None if all count.
        how: how the error was found, for the message.
        advice: what the user can do, for the message.
    """
    if not may_look():
        return
    counted = torch.ones_like(error, dtype=torch.bool) if nothing is None else ~nothing.to(error.device)
    large, unknown = (error > DIGITS_GONE) & counted, error.isnan() & counted
    if large.any():
        said = (
            f"rounding moves the scores of {int(large.sum())} of {len(error)} examples by more than "
            f"{DIGITS_GONE:.0%}"
        )
        worst = f"at worst {float(error[large].max()):.1%}, {how}: {named(large)}"
        _warn(f"{who}: {said} ({worst}); {advice}", PrecisionWarning)
    if unknown.any():
        said = (
            f"how far rounding moves the scores of {int(unknown.sum())} of {len(error)} examples is "
            f"unknown ({how}: {named(unknown)})"
        )
        _warn(f"{who}: {said}; {advice}", PrecisionWarning)


def warn_of_nothing(who: str, nothing: Tensor) -> None:
    """Give a NoRelevanceWarning if an example has no relevance.

    Args:
        who: name of the method for the message.
        nothing: (B,) bool, True for examples without relevance.
    """
    if may_look() and nothing.any():
        said = (
            f"no relevance reaches any token in {int(nothing.sum())} of {len(nothing)} examples, whose "
            f"scores are 0 ({named(nothing)})"
        )
        _warn(
            f"{who}: {said}; the logit has no positive contribution here, or none above rounding",
            NoRelevanceWarning,
        )


def _warn(message: str, kind: type[UserWarning]) -> None:
    # The warning belongs to the line outside this package that called the method. Python shows a warning
    # once for each line.
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, kind, stacklevel=level)

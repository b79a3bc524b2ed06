"""How far rounding moves a result.

Relevance is divided by sums of both signs: a residual sum, the attention output, a score. Where such a sum is
small beside its terms, its rounding error, and that of the whole forward pass before it, is amplified. Two
ways to say how much, both of the relative L2 error of the scores without the pooled token's own entry, which
the published code overwrites:

measured: once more, every layer's input and what its attention and its MLP add to it moved by about one
rounding unit of the forward pass, and compared. Both run as one batch: a short input, bound by the time that
Python takes, costs little more, a long one twice as much.

estimated: by an observer of the pass itself, see `relevance_error`.

NaN means that the error is unknown: nothing moved, or there is no relevance that could have.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.packing import position_of, sequence_sums
from pyglobenc.common.deferred import may_look
from pyglobenc.hf.trace.layers import LayerModules
from pyglobenc.hf.trace.threads import in_this_thread

METHODS = ("auto", "measured", "estimated", "off")

# "auto" measures where that costs little, by a forward pass's multiply-adds: on two cores at most half of the
# attribution's time again, on a GPU as long as its kernels are done before the host has launched the next
# ones
MEASURED_BELOW = {"cpu": 1 << 29, "cuda": 1 << 36}

# above this relative error a warning is given
DIGITS_GONE = 1e-2

TINY = 1e-300


def measured(work: int, device: torch.device) -> bool:
    """Whether "auto" measures an input of `work` multiply-adds a forward pass; tensors on torch's meta device
    stand for a CPU's.
    """
    return work < MEASURED_BELOW.get(device.type, MEASURED_BELOW["cpu"])


class PrecisionWarning(UserWarning):
    """The digits of a result are lost to rounding, or nobody knows whether they are."""


class NoRelevanceWarning(UserWarning):
    """No token gets any relevance: the scores are 0, and say nothing about the tokens."""


def squared_norm(t: Tensor) -> Tensor:
    """Sum of squares of every example, (B,), float64."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1).double().square()


def nudge(x: Tensor, cu_seqlens: Tensor | None = None, place: int = 0) -> Tensor:
    """x (B, n, d) moved by about the rounding unit of its dtype, or of the one that autocast computes in.

    The pattern of a place, a number, is the same every time: an example alone moves as in a batch, and a
    sequence alone as packed among others, (1, N, d).
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
    token = token.double()[:, None]
    feature = torch.arange(x.shape[2], device=x.device, dtype=torch.float64)
    # sines of integers: zero mean, no period
    pattern = torch.sin(token * 977 + feature + 1 + 7919 * place) * 2**0.5
    return (x.double() * (1 + pattern * torch.finfo(dtype).eps)).to(x.dtype)


@contextmanager
def nudged(found: Sequence[LayerModules]) -> Iterator[None]:
    """Context in which a model of these layers runs with every layer's input and what is added to it moved by
    a rounding unit.
    """
    places = {
        id(m): place
        for place, m in enumerate(t for layer in found for t in (layer.block, layer.output, layer.mlp_output))
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
        for module in {t for layer in found for t in (layer.output, layer.mlp_output)} - {None}:
            stack.callback(module.register_forward_hook(in_this_thread(change_output), prepend=True).remove)
        yield


def distance(moved: Tensor, scores: Tensor, own: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Relative L2 distance (B,) of two results (B, ...), of packed sequences (1, N) that of each, (S,); own
    (B, 1) or (1, S): indices of pooled tokens, whose entries are left out.
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
    """An error (B,), NaN where it is 0, which rounding isn't, and where there is no relevance."""
    return error.masked_fill((error == 0) | nothing.to(error.device), float("nan"))


def warn_of_precision(who: str, error: Tensor, nothing: Tensor | None, how: str, advice: str) -> None:
    """Give a PrecisionWarning, naming who, of examples whose error (B,) is large or unknown, but of those
    without relevance.
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
        _warn(f"{who}: {said} (at worst {float(error[large].max()):.1%}, {how}); {advice}", PrecisionWarning)
    if unknown.any():
        said = (
            f"how far rounding moves the scores of {int(unknown.sum())} of {len(error)} examples is "
            f"unknown ({how})"
        )
        _warn(f"{who}: {said}; {advice}", PrecisionWarning)


def warn_of_nothing(who: str, nothing: Tensor) -> None:
    """Give a NoRelevanceWarning, naming who, if there are examples (B,) without relevance."""
    if may_look() and nothing.any():
        said = (
            f"no relevance reaches any token in {int(nothing.sum())} of {len(nothing)} examples, whose "
            f"scores are 0"
        )
        _warn(
            f"{who}: {said}; the logit has no positive contribution here, or none above rounding",
            NoRelevanceWarning,
        )


def _warn(message: str, kind: type[UserWarning]) -> None:
    # at the line that called the method: outside this package
    warnings.warn(message, kind, stacklevel=6)

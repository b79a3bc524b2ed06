"""The attention and mask functions that transformers calls while a model is captured.

They are registered together. Without the mask function transformers passes no mask, even for padded batches.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from pyglobenc.backends.shared.score_mods import ScoreMod, SoftCap, StoredBias
from pyglobenc.common.autocast import cast_by_autocast
from pyglobenc.common.deferred import may_look
from pyglobenc.ops.attention import attention

NAME = "pyglobenc"

# The windows of transformers' own mask functions are known, so these are not called for any pair of tokens.
PLAIN = {bidirectional_mask_function: (-1, -1), causal_mask_function: (-1, 0)}


class Mask(NamedTuple):
    """The mask of one forward pass, as the mask function hands it to the attention function."""

    padding: Tensor | None  # (B, n) bool, True for real tokens; None: no padding
    window: tuple[int, int]  # query i sees keys i - left to i + right; -1: no limit on that side
    bias: Tensor | None = None  # (1 or B, H, n, n), added to the scores

    def __radd__(self, bias: Tensor) -> "Mask":
        """Return the mask with a bias of the scores; BEiT adds its relative position bias to the mask."""
        return self._replace(bias=bias)


@dataclass(frozen=True)
class Recorder:
    """Passes the tensors of an attention module's calls to the capture that registered it."""

    record: Callable[..., None]  # called with the inputs, settings and outputs of the attention function
    cu_seqlens: Tensor | None = None  # (S + 1,) int32, where each sequence packed into the input starts
    thread: int = field(default_factory=get_ident)
    cross: bool = False  # whether the module attends to another sequence than its own

    def __call__(self, **tensors: Any) -> None:
        """Record a call, if it was made in the capture's own thread."""
        if self.thread == get_ident():
            self.record(**tensors)


# The recorder of each attention module that is being captured.
RECORDERS: "WeakKeyDictionary[nn.Module, Recorder]" = WeakKeyDictionary()
_CLAIM = Lock()


@contextmanager
def recording(recorders: Mapping[nn.Module, Recorder]) -> Iterator[None]:
    """Context in which each attention module reports its calls to a recorder of its own.

    Raises:
        RuntimeError: this or another thread already captures one of the modules.
    """
    # All modules are claimed at once, because another thread may want to capture the same model.
    with _CLAIM:
        if any(module in RECORDERS for module in recorders):
            raise RuntimeError("capture: the model is being captured already")
        RECORDERS.update(recorders)
    try:
        yield
    finally:
        for module in recorders:
            RECORDERS.pop(module)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it, and record its tensors and its log-sum-exp.

    Args:
        module: the attention module that calls.
        query: (B, H, n, dh), floating point.
        key, value: (B, Hkv, n, dh), the same dtype. Under autocast the dtypes may differ. Cross attention
            may have another number of keys.
        attention_mask: the `Mask` that `mask_function` returned, or None.
        scaling: factor of the scores; None: dh ** -0.5.
        kwargs: further options of transformers' attention functions.

    Returns:
        The attention output (B, n, H, dh), the query's dtype; and None in place of the weights.

    Raises:
        ValueError: dropout, cached attention, cross attention of a module that the capture does not know as
            such, an option that isn't supported, or another mask.
    """
    recorder = RECORDERS.get(module)
    recorder = None if recorder is None or recorder.thread != get_ident() else recorder
    cross = recorder is not None and recorder.cross
    (query, key, value), settings = attention_inputs(
        module, query, key, value, attention_mask, scaling, kwargs, cross
    )
    cu_seqlens = None if recorder is None else recorder.cu_seqlens
    mod = settings["score_mod"]
    if cu_seqlens is not None and mod is not None and not isinstance(mod, SoftCap):
        raise ValueError(
            f"capture: {type(module).__name__} adds a bias for each pair of positions, which is not "
            "supported for packed sequences"
        )
    settings["cu_seqlens"] = cu_seqlens
    o, lse = attention(query, key, value, **settings)
    if recorder is not None:
        recorder(q=query, k=key, v=value, o=o, lse=lse, **settings)
    return o.transpose(1, 2).contiguous(), None


def attention_inputs(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None,
    options: dict[str, Any],
    cross: bool = False,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return q, k and v, and the settings for `pyglobenc.ops.attention`, of a call that transformers makes.

    Args:
        module, query, key, value, attention_mask, scaling: as for `attention_function`.
        options: its further keyword arguments.
        cross: whether the module may attend to another sequence.

    Raises:
        ValueError: as `attention_function`.
    """
    name = type(module).__name__
    if options.get("s_aux") is not None:
        raise ValueError(f"capture: {name} uses s_aux, which is not supported")
    if options.get("dropout"):
        raise ValueError(f"capture: {name} applies dropout of {options['dropout']}; call model.eval() first")
    if query.shape[2] != key.shape[2] and not cross:
        raise ValueError(
            f"capture: {name} attends to {key.shape[2]} keys from {query.shape[2]} queries; cached or cross "
            "attention is not supported"
        )
    window = window_of(module, options)
    key_mask, bias = _read_mask(name, attention_mask, window, query.shape[2])
    bias = _with_positions(name, bias, options.get("position_bias"))
    score_mod = bias if options.get("softcap") is None else SoftCap(options["softcap"])
    if bias is not None and score_mod is not bias:
        raise ValueError(f"capture: {name} has a soft cap and a bias of its scores, which can't be joined")
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    settings = dict(key_mask=key_mask, scaling=scaling, window=window, score_mod=score_mod)
    return cast_by_autocast(query, key, value), settings


def window_of(module: nn.Module, options: dict[str, Any]) -> tuple[int, int]:
    """Return the window that transformers requests by the options of an attention call.

    Returns:
        (left, right): query i sees keys i - left to i + right; -1 means no limit on that side.
    """
    causal = (
        options["is_causal"] if options.get("is_causal") is not None else getattr(module, "is_causal", False)
    )
    reach = -1 if options.get("sliding_window") is None else options["sliding_window"] - 1
    return reach, 0 if causal else reach


def _read_mask(
    name: str, mask: Any, window: tuple[int, int], n: int
) -> tuple[Tensor | None, ScoreMod | None]:
    """Return the padding mask (B, n) or None, and the bias of the scores or None."""
    if mask is None:
        return None, None
    if not isinstance(mask, Mask):
        came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"capture: {name}: attention_mask must be (B, n) of 0 and 1, got {came}")
    if mask.window != window and _within(mask.window, n) != _within(window, n):
        raise ValueError(
            f"capture: {name}: the model's mask has the window {mask.window}, but its attention call has the "
            f"window {window}"
        )
    return mask.padding, None if mask.bias is None else StoredBias(mask.bias)


def _with_positions(name: str, bias: ScoreMod | None, positions: Tensor | None) -> ScoreMod | None:
    """Return the bias of the scores, which the model may pass as position_bias (1 or B, H, n, m)."""
    if positions is None or (may_look() and not bool(positions.any())):
        return bias
    if bias is not None:
        raise ValueError(f"capture: {name} adds both a mask with a bias and a position_bias to its scores")
    # It does not depend on the tokens, so their gradients do not pass through it.
    return StoredBias(positions.detach())


def _within(window: tuple[int, int], n: int) -> tuple[int, ...]:
    """Return the window, with -1 for each side that reaches all n tokens."""
    return tuple(-1 if side >= n - 1 else side for side in window)


def mask_function(
    *,
    mask_function: Callable,
    batch_size: int,
    q_length: int,
    attention_mask: Tensor | None = None,
    q_offset: int = 0,
    **kwargs: Any,
) -> Mask:
    """Return the padding mask and the window of a mask, without creating an (n, n) mask.

    Args:
        mask_function: transformers' description of the mask: whether a query sees a key.
        batch_size, q_length: B and n.
        attention_mask: (B, n), 1 for real tokens and 0 for padding; or None. Cross attention may have another
            number of keys than queries.
        q_offset: position of the first query; only 0 is supported.
        kwargs: further options of transformers' mask functions.

    Raises:
        ValueError: attention uses a cache, or the mask is not bidirectional, causal or a sliding window.
    """
    cross = mask_function is bidirectional_mask_function
    if q_offset or (kwargs.get("kv_length", q_length) != q_length and not cross):
        raise ValueError("capture: cached attention is not supported; pass use_cache=False")
    window = _window(mask_function, batch_size, q_length)
    padding = (
        None
        if attention_mask is None or (may_look() and bool(attention_mask.all()))
        else attention_mask.bool()
    )
    return Mask(padding, window)


def _window(visible: Callable, batch: int, n: int) -> tuple[int, int]:
    """Return the window that a mask function describes.

    It is read from the keys of the first and the last query, and checked for all queries at its edges.
    """
    if visible in PLAIN:
        return PLAIN[visible]
    # These tensors are on the CPU, whatever the model's device is, because Python reads the results.
    i, b = torch.arange(n, device="cpu")[None], torch.arange(batch, device="cpu")[:, None]

    def seen(q: Tensor, kv: Tensor) -> Tensor:
        return torch.as_tensor(visible(b, 0, q, kv), device="cpu").expand(batch, q.shape[1])

    left = int(seen(torch.full_like(i, n - 1), i)[0].sum()) - 1
    right = int(seen(torch.zeros_like(i), i)[0].sum()) - 1
    edges = (
        (0, True),
        (-1, left > 0),
        (-left, True),
        (-left - 1, False),
        (1, right > 0),
        (right, True),
        (right + 1, False),
    )
    for distance, expected in edges:
        q = i[:, max(0, -distance) : n - max(0, distance)]
        if not bool((seen(q, q + distance) == expected).all()):
            raise ValueError(
                "capture: only bidirectional, causal and sliding window attention are supported, got "
                "another mask"
            )
    return (-1 if left == n - 1 else left, -1 if right == n - 1 else right)


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)

"""The attention and mask functions that transformers calls while a model is captured.

Registered together: without the mask function transformers passes no mask, even with padding.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from pyglobenc.ops.attention import attention

NAME = "pyglobenc"

# attention module -> called with what its attention function saw and returned
RECORDERS: "WeakKeyDictionary[nn.Module, Callable[..., None]]" = WeakKeyDictionary()


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention with its log-sum-exp; query (B, H, n, dh), key and value (B, Hkv, n, dh), attention_mask (B, n) from `mask_function`."""
    name = type(module).__name__
    for option in ("position_bias", "softcap", "sliding_window", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(f"capture: {name} uses {option}, which is not supported")
    if kwargs.get("dropout"):
        raise ValueError(f"capture: {name} applies dropout of {kwargs['dropout']}; call model.eval() first")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"capture: {name}: attention_mask must be (B, n) of 0 and 1, got {tuple(attention_mask.shape)}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"capture: {name} attends to {key.shape[2]} keys from {query.shape[2]} queries; cached or cross attention is not supported"
        )
    causal = kwargs["is_causal"] if kwargs.get("is_causal") is not None else getattr(module, "is_causal", False)
    window = (-1, 0) if causal else (-1, -1)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    o, lse = attention(query, key, value, key_mask=attention_mask, scaling=scaling, window=window)
    if module in RECORDERS:
        RECORDERS[module](q=query, k=key, v=value, o=o, lse=lse, scaling=scaling, key_mask=attention_mask, window=window)
    return o.transpose(1, 2).contiguous(), None


def mask_function(*, mask_function: Callable, attention_mask: Tensor | None = None, q_offset: int = 0, **kwargs: Any) -> Tensor | None:
    """The padding mask (B, n) alone, None without padding: causality comes with the attention call, so no (n, n) mask is made."""
    if mask_function not in (bidirectional_mask_function, causal_mask_function) or q_offset:
        raise ValueError("capture: only bidirectional and causal attention with padding are supported, got another mask")
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)

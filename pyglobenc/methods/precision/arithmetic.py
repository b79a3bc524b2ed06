"""The dtype in which captured layers are attributed."""

import logging

import torch

from pyglobenc.backends.shared.score_mods import to_dtype
from pyglobenc.common.deferred import may_look, require
from pyglobenc.hf import LayerTrace
from pyglobenc.ops import attention

log = logging.getLogger("pyglobenc")

# Rounding score and lse to float32 moves exp(score - lse) by up to 2**-24 * |lse| for each of the two.
# This is 1.5e-5 in total for an lse as large as this limit.
LARGEST_FLOAT32_LSE = 128.0


def set_precision(layers: list[LayerTrace], dtype: torch.dtype | None) -> None:
    """Cast the tensors of captured layers to a dtype, in place.

    With dtype None the layers keep the dtype of the model, and half precision is cast up where it is used.
    There is one exception: a float32 model with large attention scores is attributed in float64. There
    exp(score - lse) would lose digits that the softmax of the forward pass keeps.

    Args:
        layers: captured layers. x is (B, n, d), q is (B, H, n, dh), k and v are (B, Hkv, n, dh), as
            `LayerTrace` describes. Their o and lse are computed again in the new dtype.
        dtype: torch.float32, torch.float64 or None.

    Raises:
        ValueError: scores are too large for float32 while a CUDA graph is recorded.
    """
    if dtype is None and layers[0].q.dtype == torch.float32:
        # All layers are checked together, so the GPU is waited for only once. A padded query that sees no
        # key has an infinite lse, which doesn't count.
        scores = torch.cat([layer.lse.detach().to(layers[0].lse.device) for layer in layers], 1)
        largest = scores.nan_to_num_(posinf=0.0).abs_().amax()
        if not may_look():
            message = "attention scores are too large for float32; ask for dtype=torch.float64"
            require(largest <= LARGEST_FLOAT32_LSE, lambda: ValueError(message))
        elif (scores := float(largest)) > LARGEST_FLOAT32_LSE:
            log.info("attention scores reach %.0f: attribution in float64", scores)
            dtype = torch.float64
    if dtype is None or layers[0].q.dtype == dtype:
        return
    for layer in layers:
        layer.x, layer.q, layer.k, layer.v = (
            t.detach().to(dtype) for t in (layer.x, layer.q, layer.k, layer.v)
        )
        layer.score_mod = None if layer.score_mod is None else to_dtype(layer.score_mod, dtype)
        settings = {
            name: getattr(layer, name)
            for name in ("key_mask", "scaling", "window", "score_mod", "cu_seqlens")
        }
        layer.o, layer.lse = attention(layer.q, layer.k, layer.v, **settings)

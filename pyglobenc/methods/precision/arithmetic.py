"""Precision of the attribution arithmetic on captured layers."""

import logging

import torch

from pyglobenc.backends.shared.score_mods import to_dtype
from pyglobenc.common.deferred import may_look, require
from pyglobenc.hf import LayerTrace
from pyglobenc.ops import attention

log = logging.getLogger("pyglobenc")

# exp(score - lse) in float32 is off by up to 2**-24 * |lse| for each of the two: 1.5e-5 at this size
LARGEST_FLOAT32_LSE = 128.0


def set_precision(layers: list[LayerTrace], dtype: torch.dtype | None) -> None:
    """Cast what the layers hold to the dtype asked for, in place; None decides.

    None leaves the model's own dtype (half precision is upcast where it is used), but goes to float64 where a
    float32 model's scores are so large that exp(score - lse) would lose the digits that the softmax of the
    forward pass keeps.

    Args:
        layers: captured layers, tensors as `LayerTrace` says.
        dtype: torch.float32, torch.float64 or None.
    """
    if dtype is None and layers[0].q.dtype == torch.float32:
        # a few kernels and one wait for a GPU, not as many a layer; a padded query that sees no key has an
        # infinite one
        scores = torch.cat([layer.lse.detach().flatten().to(layers[0].lse.device) for layer in layers])
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

"""Captures attention modules that compute scores themselves and ignore transformers' attention interface.

Their forward pass runs unchanged. Queries, keys and values are taken from the outputs of the projections. The
module doesn't return the log-sum-exp, so attention is computed a second time, one block of queries at a time.
The captured tensors are not part of the autograd graph.
"""

from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.hf.trace.layers import LayerModules
from pyglobenc.hf.trace.threads import in_this_thread
from pyglobenc.ops.attention import attention


def own_attention_hooks(
    found: list[LayerModules], recorders: Mapping[nn.Module, Callable[..., None]]
) -> Iterator[Any]:
    """Register the hooks that capture the attention of layers, and yield their handles.

    Args:
        found: the layers; those without `own_scores` get no hooks.
        recorders: the function to call for each attention module, looked up when the module is called. It
            gets q, k, v and o (B, H, n, dh), lse (B, H, n), and the settings of the scores.
    """
    for layer in found:
        if layer.own_scores is None:
            continue
        projected: dict[str, Tensor] = {}
        clear = in_this_thread(lambda module, args, projected=projected: projected.clear())
        yield layer.attention.register_forward_pre_hook(clear)
        for name in ("query", "key", "value"):
            yield getattr(layer, name).register_forward_hook(in_this_thread(_keep(projected, name)))
        yield layer.attention.register_forward_hook(
            in_this_thread(_record(layer, projected, recorders)), with_kwargs=True
        )


def _keep(projected: dict[str, Tensor], name: str):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        # The module may apply the same projection to the position embeddings later in the call.
        projected.setdefault(name, output)

    return hook


def _record(
    layer: LayerModules, projected: dict[str, Tensor], recorders: Mapping[nn.Module, Callable[..., None]]
):
    # The class's signature is read, because a wrapper around the module's forward need not name arguments.
    arguments = signature(type(layer.attention).forward)

    @torch.no_grad()
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = arguments.bind(module, *args, **kwargs)
        given.apply_defaults()
        own = layer.own_scores(module, given.arguments)
        heads = module.num_attention_heads
        q, k, v = (
            projected[name].detach().unflatten(2, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        o, lse = attention(q, k, v, key_mask=own.key_mask, scaling=own.scaling, score_mod=own.score_mod)
        recorders[module](
            q=q, k=k, v=v, o=o, lse=lse, scaling=own.scaling, key_mask=own.key_mask, score_mod=own.score_mod
        )

    return hook

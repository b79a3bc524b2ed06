"""Capture of attention modules that compute their scores themselves and ignore transformers' attention
interface.

Their forward pass runs as it is; queries, keys and values are read off the projections, and the log-sum-exp,
which such a module doesn't return, is computed again a block of queries at a time. What they hold stays out
of the autograd graph.
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
    """Register the hooks that capture these layers' attention; yields their handles.

    Args:
        found: layers; those without `own_scores` are left alone.
        recorders: what an attention module's tensors are told to; read when it is called.
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
        # the same projection may be applied to the position embeddings later in the call
        projected.setdefault(name, output)

    return hook


def _record(
    layer: LayerModules, projected: dict[str, Tensor], recorders: Mapping[nn.Module, Callable[..., None]]
):
    # of the class: a wrapper around the module's own need not name its arguments
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

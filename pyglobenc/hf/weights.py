"""The matrix that a linear module applies, whatever form its weights are kept in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LEAVES = (nn.Linear, nn.LayerNorm, Conv1D)


def dense_weight(module: nn.Module) -> Tensor:
    """Weight of a linear module as the matrix W of `x @ W + b`, (inputs, outputs), detached.

    Args:
        module: a Linear layer or transformers' Conv1D; one with adapters that aren't merged; one with quantised weights, which are
            dequantised; one whose weights accelerate keeps elsewhere, which are fetched. Of any other module that is linear the
            matrix is read off by applying it to the unit vectors.
    """
    with torch.no_grad(), _present(module):
        if type(module) is nn.Linear and is_plain(module.weight):
            return module.weight.detach().T
        if isinstance(module, Conv1D) and is_plain(module.weight):
            return module.weight.detach()
        return _with_adapters(module) if hasattr(module, "base_layer") else _quantised(module)


def parameter(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter, detached; fetched if accelerate keeps it elsewhere."""
    with _present(module):
        return getattr(module, name).detach()


def is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary floating-point tensor that is there."""
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.device.type != "meta"


def weight_version(module: nn.Module) -> tuple:
    """Changes whenever the module's matrix does: with its tensors, their contents, and the adapters in use."""
    # these hold no other modules: no walk through the module, which takes longer than the rest
    plain = type(module) in LEAVES
    parameters = module._parameters.values() if plain else module.parameters()
    tensors = [(id(p), 0) if p.is_meta else (p.data_ptr(), p._version) for p in parameters if p is not None]
    if plain:
        return tuple(tensors)
    adapters = [str([getattr(m, name, None) for name in ("active_adapters", "merged", "disable_adapters")]) for m in module.modules()]
    return (*tensors, *adapters)


@contextmanager
def _present(module: nn.Module) -> Iterator[None]:
    """Weights that accelerate offloaded (they are on the meta device) are brought back inside."""
    if not any(p.device.type == "meta" for p in module.parameters()):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def _with_adapters(module: nn.Module) -> Tensor:
    """PEFT: the layer below and what the active LoRA adapters add; other kinds are read off."""
    if module.merged or module.disable_adapters:
        return dense_weight(module.base_layer)
    active = [name for name in module.active_adapters if name in getattr(module, "lora_A", {})]
    if len(active) < len(module.active_adapters) or any(getattr(module, "use_dora", {}).get(name) for name in active):
        return _applied(module)
    weight = dense_weight(module.base_layer)
    for name in active:
        delta = module.get_delta_weight(name)
        weight = weight + (delta if getattr(module, "fan_in_fan_out", False) else delta.T).to(weight.dtype)
    return weight


def _quantised(module: nn.Module) -> Tensor:
    # bitsandbytes rearranges 4-bit weights for its CPU kernel at the first call, and doesn't dequantise that layout
    packed = getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
    if type(module).__module__.startswith("bitsandbytes") and not packed:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(module.weight, state=getattr(module, "state", None)).detach().T
    if hasattr(module.weight, "dequantize") and not is_plain(module.weight) and not packed:
        return module.weight.dequantize().detach().T
    return _applied(module)


def _applied(module: nn.Module) -> Tensor:
    """The module applied to unit vectors, less its bias."""
    floats = [p for p in module.parameters() if p.is_floating_point()]
    dtype, device = (floats[0].dtype, floats[0].device) if floats else (torch.float32, None)
    units = torch.eye(module.in_features, dtype=dtype, device=device)
    return module(units) - module(torch.zeros_like(units[:1]))

"""Reads the matrix and the bias of a linear module, in whatever form its weights are stored."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyglobenc.common.deferred import require

# The relative rounding of quantised weights. Their kernels also round the inputs, to 8-bit integers.
QUANTISED_EPS = 2.0**-7
_FORWARD = nn.Linear.forward


def dense_weight(module: nn.Module, inputs: int | None = None) -> Tensor:
    """Return the matrix W that a linear module applies as `x @ W + b`.

    Args:
        module: a Linear layer or transformers' Conv1D. Adapters that aren't merged are added, quantised
            weights are dequantised, and weights that accelerate has offloaded are fetched. Any other linear
            module is applied to the unit vectors, which gives its matrix.
        inputs: number of inputs, for a module without `in_features`.

    Returns:
        (inputs, outputs), floating point, detached.

    Raises:
        ValueError: the module isn't linear, so no matrix describes it.
    """
    own = _matrix(module)
    if own is not None:
        return own
    with torch.no_grad(), _present(module):
        # An offloaded module may be dense once its weights are fetched.
        own = _matrix(module)
        if own is not None:
            return own
        return _with_adapters(module, inputs) if hasattr(module, "base_layer") else _quantised(module, inputs)


def dense_bias(module: nn.Module, inputs: int) -> Tensor | None:
    """Return the bias b of a linear module, `x @ W + b` with W (inputs, outputs).

    Args:
        module: as `dense_weight` takes it.
        inputs: number of inputs.

    Returns:
        (outputs,), floating point, detached; or None if a dense module has no bias.
    """
    if _is_dense(module) and (module.bias is None or is_plain(module.bias)):
        return None if module.bias is None else module.bias.detach()
    with torch.no_grad(), _present(module):
        if _is_dense(module):
            return dense_bias(module, inputs)
        return module(_zeros(module, inputs))[0]


def rounding_of(module: nn.Module) -> float:
    """Return the relative rounding of a linear module's weights (inputs, outputs): 0 unless quantised."""
    if _is_dense(module):
        return 0.0
    return max(
        (0.0 if is_plain(p) or p.device.type == "meta" else QUANTISED_EPS for p in module.parameters()),
        default=0.0,
    )


def runs_as_torchs(module: nn.Module) -> bool:
    """Return whether a module's output is exactly that of torch's Linear or of transformers' Conv1D.

    The module must be of one of these classes. Its weight, (outputs, inputs) or (inputs, outputs), must be an
    ordinary tensor. No hook and no replaced forward pass may change the output.
    """
    if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module) or has_global_hooks():
        return False
    return not module._forward_hooks and not module._forward_pre_hooks and is_plain(module.weight)


def versions(module: nn.Module) -> list[tuple[Tensor, int]] | None:
    """Return a module's own parameters, each with torch's count of the writes to it.

    None if torch doesn't count them (inference tensors), or if someone changed how Linear modules compute.
    """
    parameters = [p for p in module._parameters.values() if p is not None]
    patched = nn.Linear.forward is not _FORWARD or nn.functional.linear is not torch._C._nn.linear
    # a function mode may replace any of torch's functions
    if patched or torch._C._is_torch_function_mode_enabled() or any(p.is_inference() for p in parameters):
        return None
    return [(p, p._version) for p in parameters]


def same_versions(before: list[tuple[Tensor, int]], module: nn.Module) -> bool:
    """Return whether a module has the parameters it had before, and nothing was written to them since."""
    now = [p for p in module._parameters.values() if p is not None]
    return len(now) == len(before) and all(
        p is q and p._version == version for (p, version), q in zip(before, now, strict=True)
    )


def has_global_hooks() -> bool:
    """Return whether torch has hooks registered that run for every module."""
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def _is_dense(module: nn.Module) -> bool:
    return (type(module) is nn.Linear or isinstance(module, Conv1D)) and is_plain(module.weight)


def _matrix(module: nn.Module) -> Tensor | None:
    """Return the matrix of a dense module, (inputs, outputs); None if the module isn't dense."""
    if not (type(module) is nn.Linear or isinstance(module, Conv1D)) or not is_plain(weight := module.weight):
        return None
    return weight.detach() if isinstance(module, Conv1D) else weight.detach().T


def _zeros(module: nn.Module, inputs: int) -> Tensor:
    """Return a token of zeros, (1, inputs), with the dtype and device of the module's parameters."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, inputs, dtype=like.dtype, device=like.device)


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return a module's parameter by name, of any shape, detached; an offloaded one is fetched.

    Returns:
        The parameter, or None if the module has none of this name, as a norm without a weight.
    """
    own = getattr(module, name)
    if own is None or own.device.type != "meta":
        return own if own is None else own.detach()
    with _present(module):
        return getattr(module, name).detach()


def is_plain(weight: Any) -> bool:
    """Return whether a weight, such as (outputs, inputs), is an ordinary floating-point tensor with data."""
    return (
        type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.device.type != "meta"
    )


@contextmanager
def _present(module: nn.Module) -> Iterator[None]:
    """Fetch the weights that accelerate has offloaded (they are on the meta device) inside the context."""
    if not any(p.device.type == "meta" for p in module.parameters()):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def _with_adapters(module: nn.Module, inputs: int | None) -> Tensor:
    """Return the matrix of a PEFT layer: the base layer's plus those of the active LoRA adapters.

    Layers with other kinds of adapters are applied to the unit vectors.
    """
    if not hasattr(module, "active_adapters"):
        return _applied(module, inputs)
    if module.merged or module.disable_adapters:
        return dense_weight(module.base_layer)
    active = [name for name in module.active_adapters if name in getattr(module, "lora_A", {})]
    if len(active) < len(module.active_adapters) or any(
        getattr(module, "use_dora", {}).get(name) for name in active
    ):
        return _applied(module, inputs)
    weight = dense_weight(module.base_layer)
    for name in active:
        delta = module.get_delta_weight(name)
        weight = weight + (delta if getattr(module, "fan_in_fan_out", False) else delta.T).to(weight.dtype)
    return weight


def _quantised(module: nn.Module, inputs: int | None) -> Tensor:
    weight = getattr(module, "weight", None)
    # bitsandbytes rearranges 4-bit weights for its CPU kernel at the first call. It can't dequantise the new
    # layout.
    packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
    if type(module).__module__.startswith("bitsandbytes") and not packed:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(weight, state=getattr(module, "state", None)).detach().T
    if hasattr(weight, "dequantize") and not is_plain(weight) and not packed:
        return weight.dequantize().detach().T
    return _applied(module, inputs)


def _applied(module: nn.Module, inputs: int | None) -> Tensor:
    """Apply a module to the unit vectors and subtract its bias, which gives its matrix (inputs, outputs).

    Raises:
        ValueError: the module's outputs for two other vectors differ from the matrix's.
    """
    zeros = _zeros(module, inputs or module.in_features)
    units = torch.eye(zeros.shape[1], dtype=zeros.dtype, device=zeros.device)
    bias = module(zeros)
    weight = module(units) - bias
    # The test vectors have the size of normalised activations.
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(2, len(units), generator=generator, dtype=torch.float64).to(zeros)
    wide = torch.promote_types(weight.dtype, torch.float32)
    found, expected = (module(other) - bias).to(wide), other.to(wide) @ weight.to(wide)
    error, size = (torch.linalg.vector_norm(t, dim=-1) for t in (found - expected, expected))
    eps = max(torch.finfo(zeros.dtype).eps, torch.finfo(weight.dtype).eps, rounding_of(module))
    # Rounding adds up over the inputs; a quantised module rounds each input once.
    allowed = 4 * eps * (len(units) ** 0.5 if eps < 1e-5 else 4) * size
    require(
        (error <= allowed).all(),
        lambda: ValueError(f"capture: {type(module).__name__} isn't linear, so no matrix stands for W_O"),
    )
    return weight

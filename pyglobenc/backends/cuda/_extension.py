"""The compiled module, the device and stream its kernels run on, and reasons that they can't."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from pyglobenc.backends.shared.gpu import capability, is_current

try:
    from pyglobenc import _cuda as kernels
except ImportError as error:
    # not fatal here: tests put the emulated module in its place
    kernels, missing = None, f"the compiled module pyglobenc._cuda doesn't load ({error}); reinstall with nvcc on PATH"

OLDEST = (8, 0)


def device_reasons(tensors: dict[str, Tensor | None]) -> list[str]:
    """Why these tensors can't meet in a CUDA kernel, dtypes aside."""
    if kernels is None:
        return [missing]
    devices = {t.device for t in tensors.values() if t is not None}
    if len(devices) > 1:
        return ["tensors are on several devices: " + ", ".join(f"{name} {t.device}" for name, t in tensors.items() if t is not None)]
    device = devices.pop()
    if kernels.emulated:
        return [] if device.type == "cpu" else [f"the kernels are emulated, on CPU tensors, got {device}"]
    if device.type != "cuda":
        problem = kernels.problem()
        return [f"needs tensors on a GPU, got {device}" + (f" ({problem})" if problem else "")]
    if torch.version.hip:
        return ["needs an NVIDIA GPU"]
    if capability(device) < OLDEST:
        return ["needs compute capability 8.0 or later"]
    return []


def launching(device: torch.device) -> AbstractContextManager[int]:
    """Context in which launches go to a tensor's device; gives torch's current stream there, for the kernels."""
    if device.type != "cuda":
        return nullcontext(0)
    # the public way makes an object of it
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    return nullcontext(stream) if is_current(device) else _elsewhere(device, stream)


@contextmanager
def _elsewhere(device: torch.device, stream: int) -> Iterator[int]:
    with torch.cuda.device(device):
        yield stream


def allows_tf32() -> bool:
    """Whether the caller lets float32 products run on tf32 tensor cores; else they keep float32's digits."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"

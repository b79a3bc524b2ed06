"""The compiled module of CUDA kernels: whether it can run, and on which device and stream it launches."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from pyglobenc.backends.shared.launch import capability, is_current

try:
    from pyglobenc import _cuda as kernels
except ImportError as error:
    # A missing module is no error here, because the tests replace it by an emulated one.
    kernels, missing = (
        None,
        f"the compiled module pyglobenc._cuda doesn't load ({error}); reinstall with nvcc on PATH",
    )

OLDEST = (8, 0)


def device_reasons(tensors: dict[str, Tensor | None]) -> list[str]:
    """Return why a CUDA kernel can't take these tensors, of any shape and dtype, together."""
    if kernels is None:
        return [missing]
    devices = {t.device for t in tensors.values() if t is not None}
    if len(devices) > 1:
        return [
            "tensors are on several devices: "
            + ", ".join(f"{name} {t.device}" for name, t in tensors.items() if t is not None)
        ]
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
    """Return a context in which launches go to a device; it yields torch's current stream there."""
    if device.type != "cuda":
        return nullcontext(0)
    # The public function creates a Stream object, which takes longer than the launch needs.
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    return nullcontext(stream) if is_current(device) else _elsewhere(device, stream)


@contextmanager
def _elsewhere(device: torch.device, stream: int) -> Iterator[int]:
    with torch.cuda.device(device):
        yield stream


def allows_tf32() -> bool:
    """Return whether the caller allows tf32 for float32 products; if not, kernels keep float32's digits."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"

"""What the Triton launchers share: the device's limits, the precision the caller chose, and reasons a kernel can't run."""

import contextlib
import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.shared.gpu import capability, is_current

MAX_HEADS = 64
MAX_HEAD_DIM = 256

# bytes of shared memory that one program may use, by compute capability (CUDA C++ programming guide, table of technical specifications)
SHARED_LIMITS = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
SMALLEST_LIMIT = 65_536  # of AMD's compute units, and below every NVIDIA GPU since Ampere
INTERPRETED_LIMIT = SHARED_LIMITS[90]

# arguments that change with the length and number of the inputs but tell a kernel nothing of alignment: specialised for 1 and for
# multiples of 16, as Triton does by itself, `rollout_step` would be compiled 33 times over a corpus, now 3 times
COUNTS = ("m", "n_rows", "left", "right", "key_blocks", "row_blocks", "blocks", "shares", "batch", "sequences", "total_rows")


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors; the variable is read when triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on a device."""
    if device.type != "cuda":
        return INTERPRETED_LIMIT
    if torch.version.hip:
        return SMALLEST_LIMIT
    major, minor = capability(device)
    return SHARED_LIMITS.get(10 * major + minor, SMALLEST_LIMIT)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 2 stand for the interpreter's, so that it too splits long loops."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which launches go to a tensor's device."""
    return contextlib.nullcontext() if is_current(device) else torch.cuda.device(device)


def float32_precision() -> str:
    """How float32 products run on tensor cores: "tf32" where the caller allows it, else three tf32 products that keep float32's digits."""
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def registers(most: int) -> dict[str, int]:
    """Launch option that caps the registers of a thread; AMD's compiler has none."""
    return {} if torch.version.hip else {"maxnreg": most}


@cache
def driver_problem() -> str | None:
    """Why Triton can't launch kernels, or None: up to 3.6 at least its launchers take a C compiler, which many containers lack."""
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:
        return str(error)
    return None


def device_reasons(tensors: dict[str, Tensor | None]) -> list[str]:
    """Why these tensors can't meet in a Triton kernel, dtypes aside."""
    given = {name: t for name, t in tensors.items() if t is not None}
    devices = {t.device for t in given.values()}
    if len(devices) > 1:
        return ["tensors are on several devices: " + ", ".join(f"{name} {t.device}" for name, t in given.items())]
    device = devices.pop()
    if device.type == "cuda":
        if interpreting():
            return ["TRITON_INTERPRET is set: kernels run interpreted, on CPU tensors"]
        if not torch.version.hip and capability(device) < (8, 0):
            return ["needs compute capability 8.0 or later"]
        problem = driver_problem()
        return [] if problem is None else [f"Triton doesn't start: {problem}"]
    if device.type != "cpu" or not interpreting():
        return [f"needs tensors on a GPU, got {device}"]
    return []


@triton.jit
def example(OFFSETS, number, n, PACKED: tl.constexpr):
    """Which example of the batch, its first token and how many: all n, or those of one of the sequences packed into the only one."""
    if PACKED:
        first = tl.load(OFFSETS + number)
        return 0, first.to(tl.int64), tl.load(OFFSETS + number + 1) - first
    else:
        return number.to(tl.int64), 0, n


@triton.jit
def real_tokens(MASK, b, stride_b, stride_n, rows, ok, HAS_MASK: tl.constexpr):
    """Which of the rows that are ok aren't padding of example b: padding may hold anything, and is never loaded."""
    if HAS_MASK:
        ok = ok & (tl.load(MASK + b * stride_b + rows.to(tl.int64) * stride_n, mask=ok, other=0) != 0)
    return ok


def power_of_two(size: int, least: int) -> int:
    """Smallest power of two that is at least size and least."""
    # Triton's own, and its cdiv, take 3 us a call from the host: kernels may call them too
    return max(least, 1 << (size - 1).bit_length())

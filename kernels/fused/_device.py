"""Code that the Triton launchers share: the device's limits, the caller's precision, reasons to refuse."""

import contextlib
import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyglobenc.backends.shared.launch import capability, is_current

MAX_HEADS = 64
MAX_HEAD_DIM = 256

# Bytes of shared memory for one program, by compute capability (CUDA C++ programming guide, table of
# technical specifications).
SHARED_LIMITS = {
    80: 166_912,
    86: 101_376,
    87: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    120: 101_376,
}
# The limit of AMD's compute units. Every NVIDIA GPU since Ampere has more.
SMALLEST_LIMIT = 65_536
INTERPRETED_LIMIT = SHARED_LIMITS[90]

# Triton compiles a kernel anew for arguments equal to 1 and for multiples of 16. These arguments depend on
# the input's length only and need no such variants: over a corpus, `rollout_step` is compiled 3 times instead
# of 33.
COUNTS = (
    "m",
    "n_rows",
    "left",
    "right",
    "key_blocks",
    "row_blocks",
    "blocks",
    "shares",
    "batch",
    "sequences",
    "total_rows",
)


def interpreting() -> bool:
    """Return whether Triton interprets kernels on CPU tensors; it reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def shared_limit(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use on a device."""
    if device.type != "cuda":
        return INTERPRETED_LIMIT
    if torch.version.hip:
        return SMALLEST_LIMIT
    major, minor = capability(device)
    return SHARED_LIMITS.get(10 * major + minor, SMALLEST_LIMIT)


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; the interpreter counts as 2, so that it splits long loops too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which launches go to a tensor's device."""
    return contextlib.nullcontext() if is_current(device) else torch.cuda.device(device)


def float32_precision() -> str:
    """Return how float32 products run on tensor cores.

    "tf32" if the caller allows it, else "tf32x3": three tf32 products that keep float32's digits.
    """
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def registers(most: int) -> dict[str, int]:
    """Return the launch option that limits the registers of a thread; AMD's compiler has none."""
    return {} if torch.version.hip else {"maxnreg": most}


@cache
def driver_problem() -> str | None:
    """Return why Triton can't launch kernels, or None.

    Triton up to 3.6 at least needs a C compiler for its launchers, and many containers have none.
    """
    try:
        _ = triton.runtime.driver.active.utils
    except Exception as error:
        return str(error)
    return None


def device_reasons(tensors: dict[str, Tensor | None]) -> list[str]:
    """Return why a Triton kernel can't take these tensors, of any shape and dtype, together."""
    given = {name: t for name, t in tensors.items() if t is not None}
    devices = {t.device for t in given.values()}
    if len(devices) > 1:
        return [
            "tensors are on several devices: " + ", ".join(f"{name} {t.device}" for name, t in given.items())
        ]
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
def example(CU_SEQLENS, number, n, PACKED: tl.constexpr):
    """Return the example of the batch, its first token and its number of tokens.

    Of packed sequences the example is 0, and the tokens are those of sequence `number`.
    """
    if PACKED:
        first = tl.load(CU_SEQLENS + number)
        return 0, first.to(tl.int64), tl.load(CU_SEQLENS + number + 1) - first
    else:
        return number.to(tl.int64), 0, n


@triton.jit
def real_tokens(MASK, b, stride_b, stride_n, rows, ok, HAS_MASK: tl.constexpr):
    """Return (rows,) bool, True for rows that are ok and hold real tokens of example b.

    Rows that are not ok are never loaded.
    """
    if HAS_MASK:
        ok = ok & (tl.load(MASK + b * stride_b + rows.to(tl.int64) * stride_n, mask=ok, other=0) != 0)
    return ok


@triton.jit
def positive_part(x):
    """Return max(x, 0), elementwise.

    NaN stays NaN, and -inf gives NaN: a sum that overflowed may stand for any number.
    """
    return x - tl.minimum(x, 0.0)


def power_of_two(size: int, least: int) -> int:
    """Return the smallest power of two that is at least size and at least `least`."""
    # triton.next_power_of_2 and triton.cdiv take 3 us a call on the host.
    return max(least, 1 << (size - 1).bit_length())

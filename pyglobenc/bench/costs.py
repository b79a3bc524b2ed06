"""Counts the operations and bytes that an op needs, and the time they take at a device's ceilings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyglobenc.bench.op_table import OP_TABLE, Shape


@dataclass(frozen=True)
class Ceilings:
    """The best rates of a device per second: floating-point operations, exponentials, and bytes moved."""

    flops: float
    exps: float
    bytes: float

    def best(self, other: "Ceilings") -> "Ceilings":
        """Return the higher of each rate."""
        return Ceilings(
            max(self.flops, other.flops), max(self.exps, other.exps), max(self.bytes, other.bytes)
        )


@dataclass(frozen=True)
class Cost:
    """The least that a call needs: floating-point operations, exponentials, and bytes moved."""

    flops: float
    exps: float
    bytes: float

    def floor(self, ceilings: Ceilings, overlap: bool) -> float:
        """Return the least time of a call in seconds.

        Args:
            ceilings: the best rates of the device.
            overlap: exponentials run at the same time as the products, as on a GPU.
        """
        products, exps = self.flops / ceilings.flops, self.exps / ceilings.exps
        return max(max(products, exps) if overlap else products + exps, self.bytes / ceilings.bytes)


def count(op: str, arguments: Any, result: Any, *, batch: int, heads: int, n: int, dh: int) -> Cost:
    """Return the cost of one call of an op on an encoder layer of width d = heads * dh.

    Args:
        op: name of the op; "attention" is softmax attention alone.
        arguments, result: tensors, or nested lists of them, that are read and written.
        batch, heads, n, dh: B, H, n and dh of q (B, H, n, dh).

    Raises:
        ValueError: the op is not in `OP_TABLE`.
    """
    shape = Shape(batch, heads, n, dh)
    if op == "attention":
        multiply_adds, exponentials = 2 * shape.pairs * shape.d, True
    elif op in OP_TABLE:
        multiply_adds, exponentials = OP_TABLE[op].multiply_adds(shape), OP_TABLE[op].exponentials
    else:
        raise ValueError(f"count: op must be one of attention, {', '.join(OP_TABLE)}, got {op!r}")
    moved = sum(t.numel() * t.element_size() for part in (arguments, result) for t in flatten(part))
    return Cost(2 * multiply_adds, shape.pairs * heads if exponentials else 0, moved)


def flatten(part: Any) -> Iterator[Tensor]:
    """Yield every tensor, of any shape, in nested lists and tuples."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, (list, tuple)):
        for one in part:
            yield from flatten(one)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

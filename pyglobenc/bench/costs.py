"""Operations and bytes that the ops can't do without, and the time that these take on a machine of known ceilings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best: floating-point operations, exponentials and bytes read or written, all a second."""

    flops: float
    exps: float
    bytes: float

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of each."""
        return Ceilings(max(self.flops, other.flops), max(self.exps, other.exps), max(self.bytes, other.bytes))


@dataclass(frozen=True)
class Cost:
    """What a call needs at least: floating-point operations of its products, exponentials, bytes of its arguments and results."""

    flops: float
    exps: float
    bytes: float

    def floor(self, ceilings: Ceilings, overlap: bool) -> float:
        """Seconds below which no implementation gets; overlap: exponentials run beside the products, as on a GPU."""
        products, exps = self.flops / ceilings.flops, self.exps / ceilings.exps
        return max(max(products, exps) if overlap else products + exps, self.bytes / ceilings.bytes)


def count(op: str, arguments: Any, result: Any, *, batch: int, heads: int, n: int, dh: int) -> Cost:
    """Cost of one call of an op on inputs of an encoder layer, d = heads * dh wide.

    Args:
        op: its name.
        arguments, result: tensors, or lists of them, that have to be read and written.
        batch, heads, n, dh: B, H, n and dh of the call.

    Raises:
        ValueError: an op that isn't known here.

    Source: the formulas in the modules of pyglobenc/backends/reference, and of pyglobenc/backends/cpu for a shorter way, two operations to a multiply-add.
    """
    d, pairs, tokens = heads * dh, batch * n * n, batch * n
    # multiply-adds, exponentials
    counts = {
        "attention": (2 * pairs * d, pairs * heads),
        "token_norms": (pairs * (d + heads * (heads + 1) // 2), pairs * heads),
        "rollout_step": (pairs * (d + heads * (heads + 1) // 2), pairs * heads),
        # the symmetric half of G, and the residual's product
        "head_gram": (tokens * d * (d + dh) / 2 + tokens * d * d, 0),
        # the vectors, the symmetric half of G, and the residual's products
        "norm_terms": (tokens * d * (d + heads * (heads + 1) / 2 + heads), 0),
        # by the vectors, or by their quadratic forms and W_O W_O^T of every head
        "head_norms": (min(tokens * d, (tokens + d) * dh) * d, 0),
        "mapped_square": (0, 0),
        "mixing_ratio": (tokens * d * d, 0),
        "relevance_attention": (9 * pairs * d, pairs * heads),
        "relevance_maps": (3 * pairs * d, pairs * heads),
        "relevance_rollout_step": (3 * pairs * d, pairs * heads),
        # with the forward's product, which a call of the op alone has to make
        "linear_relevance": (4 * tokens * d * d, 0),
        "add_relevance": (0, 0),
        "clone_relevance": (0, 0),
    }
    if op not in counts:
        raise ValueError(f"count: known for {', '.join(counts)}, got {op!r}")
    macs, exps = counts[op]
    return Cost(2 * macs, exps, sum(t.numel() * t.element_size() for part in (arguments, result) for t in flatten(part)))


def flatten(part: Any) -> Iterator[Tensor]:
    """Every tensor of nested lists and tuples."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, (list, tuple)):
        for one in part:
            yield from flatten(one)


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Code that the kernel launchers share: dtypes, properties of the GPU, and how work over pairs is divided."""

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
MAX_SHARES = 16

# torch queries the driver on every call; the answer never changes.
capability = cache(torch.cuda.get_device_capability)


def is_current(device: torch.device) -> bool:
    """Return whether a launch goes to this device without switching to it; CPU tensors need no switch."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def float32_reasons(
    device_reasons: Callable[[dict[str, Tensor | None]], list[str]],
    widened: dict[str, Tensor | None] | None = None,
    **tensors: Tensor | None,
) -> list[str]:
    """Return the reasons why a float32 kernel can't take these tensors, which may have any shape.

    Args:
        device_reasons: function that gives the reasons other than dtypes, for tensors by name.
        widened: tensors that the kernel converts from half precision.
        tensors: the other tensors. Integer tensors and None pass.
    """
    given = {**(widened or {}), **tensors}
    others = {
        name: t
        for name, t in given.items()
        if t is not None and t.dtype != torch.float32 and t.is_floating_point()
    }
    wrong = [f"{name} {t.dtype}" for name, t in others.items() if t.dtype not in HALF or name in tensors]
    return device_reasons(given) + (["computes in float32, got " + ", ".join(wrong)] if wrong else [])


@lru_cache(maxsize=4096)
def query_shares(blocks: int, tiles: int, places: int, start: int) -> int:
    """Return the number of parts of the queries, up to MAX_SHARES, with which the last block ends soonest.

    For BERT-base, one sequence of 512 tokens gives only 8 blocks of keys, and a GPU has over a hundred
    multiprocessors.

    Args:
        blocks: number of blocks if the queries are not divided.
        tiles: number of query tiles that each of these blocks works through.
        places: number of blocks that run at the same time.
        start: cost of a block before its first tile, in tiles.
    """
    return min(
        range(1, min(tiles, MAX_SHARES) + 1),
        key=lambda shares: -(-blocks * shares // places) * (-(-tiles // shares) + start),
    )

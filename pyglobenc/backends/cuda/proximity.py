"""L1 proximity of each key's vectors to the values of rows: csrc/cuda/proximity.cu.

torch computes the transformed vectors of a block of keys, and the kernel everything else.
"""

from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._relevance import float32_reasons
from pyglobenc.backends.shared.proximity_tiles import GPU_KEYS, by_keys

# The factors of this many heads take 32 KB of shared memory.
MAX_HEADS = 256


def why_not(alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, per_head: bool) -> list[str]:
    """Return why these arguments of `pyglobenc.ops.proximity` can't run here; empty if they can."""
    reasons = float32_reasons({"v": v}, alpha=alpha, weight=weight, y=y)
    if not per_head and len(weight) > MAX_HEADS:
        reasons.append(f"takes up to {MAX_HEADS} heads, got {len(weight)}")
    return reasons


def run(alpha: Tensor, v: Tensor, weight: Tensor, y: Tensor, per_head: bool) -> Tensor:
    """See `pyglobenc.ops.proximity`: -> (B, T, n), or (B, H, T, n) with per_head."""
    return by_keys(_fill, alpha, v, weight, y, per_head, GPU_KEYS)


def _fill(alpha: Tensor, f: Tensor, y: Tensor, out: Tensor) -> None:
    """Fill out (B, T, m) for alpha (B, H, T, m), f (B, H, m, d) and y (B, T, d)."""
    with _extension.launching(f.device) as stream:
        _extension.kernels.proximity(alpha, f, y, out, stream)

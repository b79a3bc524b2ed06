"""Code that the launchers of the kernels over (query, key) pairs share.

The tiles of the kernels are in csrc/cuda/pair_tile.h.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.inputs import PairInputs
from pyglobenc.backends.shared.launch import query_shares
from pyglobenc.backends.shared.masks import sides

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# The bytes that one lane loads at once, and those that four lanes load together.
PIECE, STEP = 16, 64
# The cost of loading a block's keys and Gram matrices, in tiles. This is an estimate.
START = 2


def pair_reasons(inputs: PairInputs, **others: Tensor | None) -> list[str]:
    """Return why a kernel over pairs can't run on these inputs and the op's other tensors."""
    reasons = _extension.device_reasons({**inputs.tensors(), **others})
    reasons += inputs.reference_alone()
    q, k, gram = inputs.q, inputs.k, inputs.gram
    (_, heads, _, head_dim), kernels = q.shape, _extension.kernels
    if gram.dtype != torch.float32 or q.dtype not in DTYPES:
        reasons.append(
            f"needs gram in float32 and q in float16, bfloat16 or float32, got {gram.dtype} and {q.dtype}"
        )
    if reasons:
        return reasons
    if heads > kernels.MAX_HEADS or head_dim > MAX_HEAD_DIM:
        return [f"takes up to {kernels.MAX_HEADS} heads of up to {MAX_HEAD_DIM}, got {heads} of {head_dim}"]
    if not pair_tile(q.device, heads, k.shape[1], head_dim, q.element_size())[0]:
        return [f"no tile of {heads} heads of {head_dim} fits the device's shared memory"]
    return []


@cache
def pair_tile(device: torch.device, heads: int, kv_heads: int, head_dim: int, size: int) -> tuple[int, int]:
    """Return the number of keys of a block and of queries of a tile, for entries of `size` bytes.

    It is (0, 0) if no tile fits the device.
    """
    with _extension.launching(device):
        return _extension.kernels.pair_tile(heads, kv_heads, head_dim, size)


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; each holds one block."""
    with _extension.launching(device):
        return _extension.kernels.processors()


def in_pieces(t: Tensor, unit: int = PIECE) -> Tensor:
    """Return t (..., dh) if its rows are multiples of `unit` bytes and aligned to PIECE bytes.

    Otherwise return a contiguous copy with padded rows.
    """
    size, (*steps, last) = t.element_size(), t.stride()
    if (
        last == 1
        and math.gcd(t.data_ptr(), size * math.gcd(*steps)) % PIECE == 0
        and t.shape[-1] * size % unit == 0
    ):
        return t
    return F.pad(t, (0, -t.shape[-1] % (unit // size))).contiguous()


def near(t: Tensor) -> Tensor:
    """Return t (B, H, n, ...), copied if its heads lie 2 GiB or more apart.

    The kernels use 32-bit offsets within a head.
    """
    return t if t.stride(1) * t.element_size() < 2**31 else t.contiguous()


def run_pairs(
    op: str, inputs: PairInputs, own: tuple[Tensor | None, ...], outs: tuple[Tensor | None, ...], longest: int
) -> None:
    """Launch the kernel of an op over pairs.

    Args:
        op: name of the kernel.
        inputs: tensors of the layer.
        own: rows (B, T), r (B, T, n), the cu_seqlens (S + 1,) on the device, and log_scale (B, T). Those that
            the op does not have are None.
        outs: the result, (B, n, n) or (B, T, n), and the new log_scale (B, T) of a rollout step or None.
        longest: largest number of queries that one key meets.
    """
    rows, r, cu_seqlens, _ = own
    others = (inputs.gram, inputs.cross, inputs.residual_sq, inputs.rstd, inputs.key_mask, *own)
    q, k, lse = in_pieces(near(inputs.q), STEP), in_pieces(near(inputs.k), STEP), near(inputs.lse.float())
    kernels, (batch, heads, n, head_dim) = _extension.kernels, q.shape
    n_queries, n_rows = n if rows is None else rows.shape[1], 0 if r is None else r.shape[1]
    keys, queries = pair_tile(q.device, heads, k.shape[1], head_dim, q.element_size())
    blocks = -(-n // keys) * batch * max(1, -(-n_rows // kernels.MAX_ROWS))
    shares = query_shares(blocks, -(-longest // queries), processors(q.device), START)
    room = outs[0].new_empty(
        kernels.pair_room(batch, heads, n, n_queries, n_rows, shares, cu_seqlens is not None)
    )
    tensors = (q, k, lse, *others, *outs, room)
    exact = q.dtype == torch.float32 and not _extension.allows_tf32()
    with _extension.launching(q.device) as stream:
        getattr(kernels, op)(tensors, inputs.scaling, *sides(inputs.window, n), shares, exact, stream)
